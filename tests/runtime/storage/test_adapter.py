"""The adapter folder: round trip, digest, and every way it can be wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from helpers.paths import REPOSITORY
from safetensors.numpy import load_file

from adalink.runtime.errors import AdapterError, ConfigError
from adalink.runtime.storage.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    encode_adapter,
    make_adapter,
    read_adapter,
    weight_shapes,
)
from adalink.runtime.storage.adapter_spec import MOST_SOFT_TOKENS
from adalink.runtime.storage.digest import fingerprint_embeddings
from adalink.runtime.storage.kv_prefix_spec import KV_PREFIX_NAME, KvPrefixSpec

EXAMPLES = REPOSITORY / "examples" / "adapters"
VOCAB_SIZE = 11
SOFT_ALONE: dict[str, object] = {"rank": 0, "activation": "identity", "bias": False, "soft_tokens": 5}
BY_IDS: dict[str, object] = {"activation": "identity", "bias": False, "input": "ids"}
FINGERPRINT = "sha256:" + "0123456789abcdef" * 4


def make_config(**changes: object) -> AdapterConfig:
    settings: dict[str, object] = {
        "base_model_name_or_path": "tiny",
        "base_fingerprint": FINGERPRINT,
        "hidden_size": 24,
        "rank": 3,
        "activation": "gelu",
        "bias": True,
        "modalities": ("text",),
        "scope": "all",
    }
    return AdapterConfig(**(settings | changes))  # type: ignore[arg-type]


def make(seed: int = 0, **changes: object) -> Adapter:
    config = make_config(**changes)
    rng = np.random.default_rng(seed)
    shapes = weight_shapes(config, VOCAB_SIZE)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return make_adapter(config, weights)


def write(folder: Path, adapter: Adapter) -> Path:
    folder.mkdir(exist_ok=True)
    config, weights = encode_adapter(adapter)
    (folder / CONFIG_FILE).write_bytes(config)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    return folder


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    adapter = make(modalities=("text", "image"))
    again = read_adapter(write(tmp_path, adapter))
    assert again.config == adapter.config
    assert again.digest == adapter.digest
    assert again.weights.keys() == adapter.weights.keys()
    for name, weight in adapter.weights.items():
        np.testing.assert_array_equal(again.weights[name], weight)


@pytest.mark.parametrize("name", ["reuters-r8", "tweet-author"])
def test_adapters_of_the_first_format_keep_digest_and_bytes(name: str) -> None:
    adapter = read_adapter(EXAMPLES / name)
    assert adapter.digest == json.loads((EXAMPLES / name / "training.json").read_text())["adapter_digest"]
    assert encode_adapter(adapter)[0] == (EXAMPLES / name / CONFIG_FILE).read_bytes()


@pytest.mark.parametrize(
    ("settings", "tensors"),
    [
        (SOFT_ALONE, {"soft_prompt": (5, 24)}),
        (
            {"bias": False, "soft_tokens": 2},
            {"soft_prompt": (2, 24), "text.down.weight": (3, 24), "text.up.weight": (24, 3)},
        ),
        (BY_IDS, {"text.table.weight": (VOCAB_SIZE, 3), "text.up.weight": (24, 3)}),
    ],
    ids=["soft prompt", "soft prompt and bottleneck", "ids"],
)
def test_other_input_side_methods_come_back_as_they_were(
    tmp_path: Path, settings: dict[str, object], tensors: dict[str, tuple[int, ...]]
) -> None:
    adapter = make(**settings)
    again = read_adapter(write(tmp_path, adapter))
    assert again.config == adapter.config
    assert again.digest == adapter.digest
    assert {name: weight.shape for name, weight in again.weights.items()} == tensors
    for name, weight in adapter.weights.items():
        np.testing.assert_array_equal(again.weights[name], weight)
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert {"soft_tokens", "input"} & fields.keys() == {"soft_tokens", "input"} & settings.keys()


def test_the_soft_prompt_is_part_of_the_digest() -> None:
    adapter = make(**SOFT_ALONE)
    changed = adapter.weights["soft_prompt"].copy()
    changed[4, 23] += 1
    assert make_adapter(adapter.config, {"soft_prompt": changed}).digest != adapter.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "at least 1, .*; 0 is for adapters with a soft prompt"),
        ({"soft_tokens": -1}, f"from 0 to {MOST_SOFT_TOKENS}"),
        ({"soft_tokens": MOST_SOFT_TOKENS + 1}, f"from 0 to {MOST_SOFT_TOKENS}"),
        (SOFT_ALONE | {"activation": "gelu"}, "'identity', no bias and input 'embeddings'"),
        (SOFT_ALONE | {"bias": True}, "'identity', no bias and input 'embeddings'"),
        (SOFT_ALONE | {"input": "ids"}, "'identity', no bias and input 'embeddings'"),
        ({"input": "tokens"}, "expected one of embeddings, ids"),
        (BY_IDS | {"modalities": ("text", "image")}, r"modalities \('text',\)"),
        (BY_IDS | {"activation": "relu"}, "activation 'identity'"),
        ({"kv_prefix": KvPrefixSpec(tokens=0)}, "kv_prefix.tokens is 0"),
        ({"kv_prefix": KvPrefixSpec(tokens=2, dtype="int8")}, "kv_prefix.dtype is 'int8', expected float32 or float16"),
        ({"kv_prefix": KvPrefixSpec(tokens=2, variant_digest="int4")}, "kv_prefix.variant_digest is 'int4'"),
    ],
)
def test_settings_of_soft_prompts_and_tables_of_ids_are_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


def test_a_soft_prompt_of_another_length_than_the_config_says_is_refused() -> None:
    adapter = make(**SOFT_ALONE)
    with pytest.raises(AdapterError, match=r"'soft_prompt' has shape \(4, 24\), expected \(5, 24\)"):
        make_adapter(adapter.config, {"soft_prompt": adapter.weights["soft_prompt"][:4]})


def make_kv_prefix(dtype: str, **settings: object) -> Adapter:
    spec = KvPrefixSpec(tokens=3, dtype=dtype)
    config = make_config(**({"rank": 0, "activation": "identity", "bias": False, "kv_prefix": spec} | settings))
    states = np.random.default_rng(4).normal(size=(2, 2, 1, 3, 4)).astype(dtype).astype(np.float32)
    others = {
        name: np.full(shape, 0.1, np.float32) for name, shape in weight_shapes(config).items() if name != KV_PREFIX_NAME
    }
    return make_adapter(config, others | {KV_PREFIX_NAME: states})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("settings", [{}, {"rank": 3, "soft_tokens": 2}], ids=["alone", "beside others"])
def test_a_kv_prefix_comes_back_as_it_was(tmp_path: Path, dtype: str, settings: dict[str, object]) -> None:
    adapter = make_kv_prefix(dtype, **settings)
    again = read_adapter(write(tmp_path, adapter))
    assert (again.config, again.digest) == (adapter.config, adapter.digest)
    for name, weight in adapter.weights.items():
        np.testing.assert_array_equal(again.weights[name], weight)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert {name: str(weight.dtype) for name, weight in stored.items()} == {
        name: dtype if name == KV_PREFIX_NAME else "float32" for name in adapter.weights
    }
    expected = {"tokens": 3} if dtype == "float32" else {"tokens": 3, "dtype": dtype}
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["kv_prefix"] == expected


def test_a_kv_prefix_is_part_of_the_digest_and_fits_its_config() -> None:
    adapter = make_kv_prefix("float16")
    states = adapter.weights[KV_PREFIX_NAME]
    changed = states.copy()
    changed[1, 1, 0, 2, 3] += 1
    assert make_adapter(adapter.config, {KV_PREFIX_NAME: changed}).digest != adapter.digest
    with pytest.raises(AdapterError, match=r"has shape \(2, 2, 1, 2, 4\), expected \(2, 2, 1, 3, 4\)"):
        make_adapter(adapter.config, {KV_PREFIX_NAME: states[:, :, :, :2]})
    with pytest.raises(AdapterError, match=r"expected \(0, 2, 0, 3, 0\)"):
        make_adapter(adapter.config, {KV_PREFIX_NAME: states[0]})
    with pytest.raises(AdapterError, match="numbers that float16 cannot store"):
        make_adapter(adapter.config, {KV_PREFIX_NAME: states * np.float32(1.0001)})
    with pytest.raises(AdapterError, match="'kv_prefix' is not part of the method"):
        make_adapter(make_config(), {**make().weights, KV_PREFIX_NAME: states})


def test_config_on_disk_has_the_documented_fields(tmp_path: Path) -> None:
    write(tmp_path, make())
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert fields == {
        "peft_type": "ADALINK",
        "base_model_name_or_path": "tiny",
        "base_fingerprint": FINGERPRINT,
        "hidden_size": 24,
        "rank": 3,
        "activation": "gelu",
        "bias": True,
        "modalities": ["text"],
        "scope": "all",
    }


def test_each_modality_can_have_its_own_rank(tmp_path: Path) -> None:
    adapter = make(modalities=("text", "image"), rank={"image": 7, "text": 2})
    shapes = {name: weight.shape for name, weight in adapter.weights.items() if name.endswith("weight")}
    assert shapes["text.down.weight"] == (2, 24) == shapes["text.up.weight"][::-1]
    assert shapes["image.down.weight"] == (7, 24) == shapes["image.up.weight"][::-1]
    again = read_adapter(write(tmp_path, adapter))
    assert again.config == adapter.config
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["rank"] == {"image": 7, "text": 2}
    other_order = make(modalities=("text", "image"), rank={"text": 2, "image": 7})
    assert again.digest == adapter.digest == other_order.digest
    with pytest.raises(AdapterError, match=r"'text.down.weight' has shape \(2, 24\), .* rank image=2,text=7"):
        make_adapter(make_config(modalities=("text", "image"), rank={"image": 2, "text": 7}), adapter.weights)


def test_digests_of_one_rank_are_what_they_were() -> None:
    """Of the fields and tensors as they were before modalities could have ranks of their own."""
    adapter = make()
    fields = {
        "activation": "gelu",
        "base_fingerprint": FINGERPRINT,
        "base_model_name_or_path": "",
        "bias": True,
        "hidden_size": 24,
        "modalities": ["text"],
        "peft_type": "ADALINK",
        "rank": 3,
        "scope": "all",
    }
    state = hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode())
    for name in sorted(adapter.weights):
        state.update(f"\0{name}\0".encode() + adapter.weights[name].tobytes())
    assert adapter.digest == f"sha256:{state.hexdigest()}"


def test_digest_follows_the_arithmetic_and_nothing_else() -> None:
    digest = make().digest
    assert make(base_model_name_or_path="another name").digest == digest
    assert make(activation="silu").digest != digest
    assert make(scope="prompt").digest != digest
    changed = make()
    weights = {name: weight.copy() for name, weight in changed.weights.items()}
    weights["text.up.weight"][5, 1] = np.nextafter(weights["text.up.weight"][5, 1], np.float32(9))
    assert make_adapter(changed.config, weights).digest != digest


@pytest.mark.parametrize(
    ("changes", "wording"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": -4}, "rank is -4"),
        ({"rank": 25}, "hidden_size 24"),
        ({"rank": True}, "whole number"),
        ({"rank": {"text": 0}}, "rank is {'text': 0}, expected a whole number of at least 1, or one for each"),
        ({"rank": {"text": 3, "image": 3}}, "rank is for text, image and the modalities are text: expected one"),
        ({"rank": {}}, "rank is for nothing and the modalities are text"),
        ({"rank": {"text": 25}}, "rank is text=25 and hidden_size 24"),
        ({"activation": "swish"}, "expected one of identity"),
        ({"scope": "some"}, "expected one of all, prompt"),
        ({"modalities": ()}, "at least one name"),
        ({"modalities": ("text", "text")}, "none twice"),
        ({"modalities": ("../x",)}, "not a name"),
        ({"hidden_size": 0, "rank": 1}, "hidden_size is 0"),
        ({"base_fingerprint": "sha256:12"}, "not a digest"),
        ({"peft_type": "LORA"}, "another kind of adapter"),
    ],
)
def test_settings_outside_the_method_are_refused(changes: dict[str, object], wording: str) -> None:
    with pytest.raises(ConfigError, match=wording):
        make_config(**changes)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(tmp_path: Path, bad: float) -> None:
    adapter = make()
    adapter.weights["text.down.weight"][1, 2] = bad
    with pytest.raises(AdapterError, match=r"text\.down\.weight.*NaN or infinity"):
        read_adapter(write(tmp_path, adapter))


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    adapter = make()
    without = {name: weight for name, weight in adapter.weights.items() if name != "text.up.bias"}
    with pytest.raises(AdapterError, match=r"'text\.up\.bias' is missing"):
        make_adapter(adapter.config, without)
    with pytest.raises(AdapterError, match="'stray' is not part"):
        make_adapter(adapter.config, adapter.weights | {"stray": np.zeros(2, np.float32)})
    with pytest.raises(AdapterError, match=r"shape \(24, 3\), expected \(3, 24\)"):
        make_adapter(adapter.config, adapter.weights | {"text.down.weight": np.zeros((24, 3), np.float32)})


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_every_truncation_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, make())
    whole = (tmp_path / name).read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(AdapterError, match=name):
            read_adapter(tmp_path)


def test_json_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    deep = b"[" * 200_000
    write(tmp_path, make())
    config, weights = ((tmp_path / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE))
    (tmp_path / WEIGHTS_FILE).write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(AdapterError, match=f"{WEIGHTS_FILE} is not a complete safetensors file: .* nested too deeply"):
        read_adapter(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(weights)
    for field in (b'"more": ', b'"modalities": '):
        (tmp_path / CONFIG_FILE).write_bytes(config.replace(b"{", b"{" + field + deep + b"]" * len(deep) + b",", 1))
        with pytest.raises(AdapterError, match=f"{CONFIG_FILE}: its values are nested too deeply"):
            read_adapter(tmp_path)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    write(tmp_path, make())
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is pickled.*never loaded"):
        read_adapter(tmp_path)


def test_an_adapter_one_level_down(tmp_path: Path) -> None:
    for name in ("my_task", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(AdapterError, match=rf"one level down, in my_task, other: give {tmp_path}/my_task"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_git_lfs_pointers(tmp_path: Path, name: str) -> None:
    for file, data in zip((CONFIG_FILE, WEIGHTS_FILE), encode_adapter(make()), strict=True):
        (tmp_path / file).write_bytes(data)
    read_adapter(tmp_path)
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 300000\n")
    with pytest.raises(AdapterError, match=rf"{name} is a Git LFS pointer of 131 bytes .* of 300000 .*git lfs pull"):
        read_adapter(tmp_path)


def test_no_folder_and_missing_field(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        read_adapter(tmp_path / "nothing")
    with pytest.raises(AdapterError, match="no such folder"):
        read_adapter("a" * 5000)
    write(tmp_path, make())
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    del fields["rank"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields))
    with pytest.raises(AdapterError, match="rank"):
        read_adapter(tmp_path)


def test_half_precision_weights_are_read_as_float32(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    adapter = make()
    half = {name: weight.astype(np.float16) for name, weight in adapter.weights.items()}
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / CONFIG_FILE).write_bytes(msgspec.json.encode(adapter.config))
    save_file(half, tmp_path / WEIGHTS_FILE)
    again = read_adapter(tmp_path)
    for name, weight in half.items():
        assert again.weights[name].dtype == np.float32
        np.testing.assert_array_equal(again.weights[name], weight.astype(np.float32))


def test_fingerprint_is_the_documented_digest() -> None:
    weight = np.random.default_rng(3).normal(size=(1700, 33)).astype(np.float32)
    expected = hashlib.sha256(b"1700,33;" + weight.astype("<f4").tobytes(order="C")).hexdigest()
    assert fingerprint_embeddings(weight) == f"sha256:{expected}"
    assert fingerprint_embeddings(np.asfortranarray(weight)) == f"sha256:{expected}"
    assert fingerprint_embeddings(weight.T) != f"sha256:{expected}"
