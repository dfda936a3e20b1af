"""Models and settings that a base export refuses, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import DECODERS, FAMILIES

from adalink.export.base.export import export_base
from adalink.runtime.errors import ConfigError, DeploymentError, ModelError


def test_quantised_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise ValueError("You cannot cast a bitsandbytes model in a new `dtype`.")

    model = DECODERS["llama"]()
    monkeypatch.setattr(type(model), "to", refuse)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM are quantised.*--quantize"):
        export_base(model, tmp_path)


def refused(model: Any, tmp_path: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        export_base(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unsupported_type_names_the_supported_ones(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(vocab_size=96, hidden_size=48, num_hidden_layers=1, num_attention_heads=4)
    refused(GPTNeoXForCausalLM(config), tmp_path, r"'gpt_neox' is not supported; supported are bert, .*llama.*t5")


def test_model_that_needs_token_ids_inside_is_refused_with_the_reason(tmp_path: Path) -> None:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=96, vocab_size_per_layer_input=96, hidden_size=48, hidden_size_per_layer_input=8,
        intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        laurel_rank=4, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["full_attention"] * 2,
    )  # fmt: skip
    refused(Gemma3nForCausalLM(config), tmp_path, "look token ids up again")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_table_that_follows_the_batch_is_refused(kind: str, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    refused(model, tmp_path, f"rope type '{kind}': .* longest row of a batch")


@pytest.mark.parametrize(
    ("family", "setting", "reason"),
    [
        ("gemma3", "use_bidirectional_attention", "attends in both directions"),
        ("bert", "is_decoder", "an encoder type configured as a decoder"),
        ("bert", "chunk_size_feed_forward", "computed in chunks .* set it to 0, which computes the same"),
        ("gpt2", "add_cross_attention", "cross attention to another model"),
    ],
)
def test_settings_that_a_graph_cannot_honour_are_refused(
    family: str, setting: str, reason: str, tmp_path: Path
) -> None:
    model = FAMILIES[family]()
    setattr(model.config, setting, True)
    refused(model, tmp_path, reason)


def test_attention_refuses_a_cap_instead_of_ignoring_it() -> None:
    from adalink.export.tracing.attention import plain_attention

    heads = torch.ones(1, 2, 3, 4)
    with pytest.raises(ModelError, match=r"caps its attention scores at 30\.0"):
        plain_attention(torch.nn.Identity(), heads, heads, heads, None, softcap=30.0)


def test_decoder_without_its_head_is_refused(tmp_path: Path) -> None:
    refused(FAMILIES["llama"]().model, tmp_path, "LlamaModel has no language model head")


def test_model_with_a_hooked_embedding_is_refused(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + 1)
    refused(model, tmp_path, r"has a hook, such as an attached adapter.*detach\(\)")


@pytest.mark.parametrize(
    "changes", [{"dtype": "int8"}, {"target": "openvino"}, {"modalities": ("image",)}, {"modalities": ("text", "text")}]
)
def test_unknown_settings_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected"):
        export_base(FAMILIES["llama"](), tmp_path / "out", **changes)


def test_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("five years of work")
    with pytest.raises(DeploymentError, match=r"holds 'thesis.txt' and no manifest.json"):
        export_base(FAMILIES["llama"](), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
