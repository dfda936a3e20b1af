"""One check of an adapter against a base: every fault is named, with both sides and the repair."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from adalink.runtime.errors import ContractError
from adalink.runtime.storage.adapter import Adapter, AdapterConfig, encode_adapter, make_adapter, weight_shapes
from adalink.runtime.storage.contract import check_adapter
from adalink.runtime.storage.kv_prefix_spec import KvPrefixSpec
from adalink.runtime.storage.manifest import Cache

OWN, OTHER = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32


OTHER_CACHE = Cache(layers=2, kv_heads=3, head_dim=1)


@dataclass(frozen=True)
class FakeBase:
    name: str = "tiny"
    fingerprint: str = OWN
    hidden_size: int = 6
    vocab_size: int = 11
    embedding_dtype: str = "float16"
    max_positions: int | None = 8
    modalities: tuple[str, ...] | None = ("text",)
    takes_soft_prompts: bool = True
    cache: Cache | None = field(default_factory=lambda: Cache(layers=2, kv_heads=1, head_dim=3))
    no_kv_prefix: str = ""
    has_hidden_states: bool = True


def make(value: float = 1.0, **changes: Any) -> Adapter:
    settings = {
        "base_model_name_or_path": "somebody/tiny",
        "base_fingerprint": OWN,
        "hidden_size": 6,
        "rank": 2,
        "activation": "identity",
        "bias": False,
        "modalities": ("text",),
        "scope": "all",
    }
    config = AdapterConfig(**(settings | changes))
    weights = {name: np.full(shape, value, np.float32) for name, shape in weight_shapes(config, 11, (2, 1, 3)).items()}
    return make_adapter(config, weights)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_prefix": KvPrefixSpec(tokens=2), "soft_tokens": 3},
        {"soft_tokens": 7},
        {"rank": 0, "soft_tokens": 1},
        {"input": "ids"},
    ],
    ids=str,
)
def test_fitting_adapter_passes(changes: dict[str, Any]) -> None:
    check_adapter(make(**changes), FakeBase(), "adapter a")


@pytest.mark.parametrize(
    ("adapter", "base", "message"),
    [
        (
            {"base_fingerprint": OTHER},
            {},
            (
                f"adapter a belongs to another base: it was trained for somebody/tiny ({OTHER}), tiny of deployment x "
                f"has {OWN}: train it for this base, or use it with its own"
            ),
        ),
        (
            {"modalities": ("text", "audio")},
            {},
            (
                "adapter a adapts modality 'audio', tiny of deployment x was exported for text: export the base with "
                "--modality audio as well, or use an adapter without it"
            ),
        ),
        ({"hidden_size": 5}, {}, "adapter a has hidden_size 5, tiny of deployment x has 6: its adapter_config.json"),
        ({"soft_tokens": 8}, {}, "soft prompt of 8 positions, tiny of deployment x was made for at most 8"),
        ({"soft_tokens": 1}, {"takes_soft_prompts": False}, "use an adapter without a soft prompt"),
        ({"soft_tokens": 1, "value": 7e4}, {}, "the soft prompt holds numbers beyond float16"),
        ({"kv_prefix": KvPrefixSpec(tokens=1)}, {"no_kv_prefix": "it is odd"}, "none can stand before rows of tiny"),
        (
            {"kv_prefix": KvPrefixSpec(tokens=1)},
            {"cache": OTHER_CACHE},
            "asks for (2, 2, 3, 1, 1) (layers, 2, kv_heads",
        ),
        ({"kv_prefix": KvPrefixSpec(tokens=7), "soft_tokens": 1}, {}, "puts 8 positions before every text, 7 of them"),
        ({"kv_prefix": KvPrefixSpec(tokens=1), "value": 7e4}, {}, "the KV prefix holds numbers beyond float16"),
        ({"input": "ids"}, {"vocab_size": 12}, "table of 11 token ids, tiny of deployment x has 12"),
        ({"input": "ids"}, {"embedding_dtype": "bfloat16"}, "export the base with --dtype fp32 or fp16"),
    ],
    ids=[
        "base",
        "modality",
        "width",
        "positions",
        "grid",
        "range",
        "no cache",
        "cache",
        "before",
        "prefix range",
        "vocabulary",
        "bfloat16",
    ],
)
def test_fault_is_named_with_both_sides(adapter: dict[str, Any], base: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError) as caught:
        check_adapter(make(**adapter), replace(FakeBase(), **base), "adapter a", holder="deployment x")
    assert message in str(caught.value)


def test_base_without_limits_takes_what_fits() -> None:
    base = FakeBase(max_positions=None, modalities=None)
    check_adapter(make(soft_tokens=4096, modalities=("text", "audio")), base, "adapter a")


def test_caller_says_the_repair() -> None:
    with pytest.raises(ContractError, match=r"tiny has sha256:\w+: load it in float32$"):
        check_adapter(make(base_fingerprint=OTHER), FakeBase(), "adapter a", repair="load it in float32")


def test_another_tokenizer_is_refused() -> None:
    adapter = make(tokenizer_digest=OWN)
    check_adapter(adapter, FakeBase(), "adapter a", tokenizer_digest=OWN)
    check_adapter(adapter, FakeBase(), "adapter a")  # the base's is unknown
    check_adapter(make(), FakeBase(), "adapter a", tokenizer_digest=OTHER)  # an adapter of an older kit
    with pytest.raises(ContractError) as caught:
        check_adapter(adapter, FakeBase(), "adapter a", holder="deployment x", tokenizer_digest=OTHER)
    for part in (
        f"adapter a was trained with another tokenizer ({OWN}) than tiny of deployment x has ({OTHER})",
        "Export the base again with that tokenizer, or train the adapter again",
        "remove tokenizer_digest from its adapter_config.json",
    ):
        assert part in str(caught.value)


def test_digest_of_older_adapters_stays() -> None:
    config, _ = encode_adapter(make())
    assert b"tokenizer_digest" not in config
    assert make().digest == make(tokenizer_digest="").digest != make(tokenizer_digest=OWN).digest
