"""Rows of codes against numpy float64, and files that were written otherwise."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.runtime import random_adapter
from safetensors.numpy import load, save

from adalink.runtime.errors import AdapterError, ConfigError
from adalink.runtime.storage.adapter import Adapter, decode_adapter, encode_adapter, make_adapter
from adalink.runtime.storage.quantized_rows import decode_rows, encode_rows, round_rows

FINGERPRINT = f"sha256:{'1' * 64}"
SETTINGS = {"rank": 6, "activation": "identity", "bias": True, "scope": "all"}


def matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(9, 31)) * 10.0 ** rng.integers(-12, 12, size=(9, 1))
    edges = np.zeros((5, 8))
    edges[1, 3], edges[2, :2], edges[3], edges[4, 0] = 1e-37, (1.0, -1.0), np.linspace(-1, 1, 8), 3e38
    return {"spread": spread.astype(np.float32), "edges": edges.astype(np.float32)}


def packed(name: str, codes: np.ndarray) -> np.ndarray:
    """Codes as the file format says, written out here."""
    if name == "int8":
        return codes.astype(np.int8)
    rows = []
    for row in codes.astype(int).tolist():
        numbers = [code + 8 for code in ([*row, 0] if len(row) % 2 else row)]
        rows.append([low + 16 * high for low, high in zip(numbers[::2], numbers[1::2], strict=True)])
    return np.array(rows, np.uint8)


@pytest.mark.parametrize("matrix", matrices().values(), ids=list(matrices()))
@pytest.mark.parametrize(("weight_dtype", "most"), [("int8", 127), ("int4", 7)])
def test_rows_are_rounded_to_the_nearest_code_and_come_back_as_they_were(
    matrix: np.ndarray, weight_dtype: str, most: int
) -> None:
    rounded = round_rows(matrix, weight_dtype)
    step = np.abs(matrix.astype(np.float64)).max(axis=1, keepdims=True) / most
    step = np.where(step < 2.0**-100, 2.0**-99, step)  # rows of such numbers are 0
    assert (np.abs(rounded - matrix.astype(np.float64)) <= step * (0.5 + most * 2.0**-12)).all()
    stored = encode_rows(rounded, weight_dtype)
    again = decode_rows(stored["codes"], stored["scales"], matrix.shape[1], weight_dtype)
    np.testing.assert_array_equal(again, rounded)
    codes = np.rint(rounded / np.where(stored["scales"] > 0, stored["scales"], 1)[:, None].astype(np.float64))
    np.testing.assert_array_equal(stored["codes"], packed(weight_dtype, codes))
    np.testing.assert_array_equal(round_rows(rounded, weight_dtype), rounded)


def rounded_adapter(weight_dtype: str) -> Adapter:
    adapter = random_adapter(FINGERPRINT, 31, 3, **SETTINGS)
    weights = dict(adapter.weights)
    weights["text.down.weight"] = round_rows(weights["text.down.weight"], weight_dtype)
    weights["text.up.weight"] = np.ascontiguousarray(
        round_rows(np.ascontiguousarray(weights["text.up.weight"].T), weight_dtype).T
    )
    config = random_adapter(FINGERPRINT, 31, 3, **SETTINGS, weight_dtype=weight_dtype).config
    return make_adapter(config, weights)


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_an_adapter_in_few_bits_is_small_and_read_back_bit_for_bit(weight_dtype: str) -> None:
    adapter = rounded_adapter(weight_dtype)
    config, weights = encode_adapter(adapter)
    read = decode_adapter(config, np.frombuffer(weights, np.uint8), "it")
    assert read.digest == adapter.digest
    assert encode_adapter(read) == (config, weights)
    tensors = load(weights)
    width = 31 if weight_dtype == "int8" else 16
    assert tensors["text.up.weight.codes"].shape == tensors["text.down.weight.codes"].shape == (6, width)
    for name in ("text.down.weight", "text.up.weight"):
        numbers = tensors[f"{name}.codes"].astype(np.int64)
        if weight_dtype == "int4":
            numbers = np.stack((numbers % 16 - 8, numbers // 16 - 8), axis=-1).reshape(6, -1)[:, :31]
        expected = numbers * tensors[f"{name}.scales"].astype(np.float64)[:, None]
        weight = read.weights[name]
        np.testing.assert_array_equal(weight.T if "up" in name else weight, expected)


FAULTS = {
    "scales are missing": lambda tensors: tensors.pop("text.up.weight.scales"),
    "codes are missing": lambda tensors: tensors.pop("text.up.weight.codes"),
    "a scale is not one of ours": lambda tensors: tensors["text.up.weight.scales"].__setitem__(0, 0.1),
    "a scale is NaN": lambda tensors: tensors["text.up.weight.scales"].__setitem__(0, np.nan),
    "a scale is too large": lambda tensors: tensors["text.up.weight.scales"].fill(3e38),
    "a scale is negative": lambda tensors: np.negative(
        tensors["text.up.weight.scales"], out=tensors["text.up.weight.scales"]
    ),
    "a code is beyond the largest": lambda tensors: tensors["text.up.weight.codes"].__setitem__(
        (0, 0), -128 if tensors["text.up.weight.codes"].dtype == np.int8 else 0
    ),
    "codes are of another width": lambda tensors: tensors.update(
        {"text.up.weight.codes": np.ascontiguousarray(tensors["text.up.weight.codes"][:, :-1])}
    ),
    "the matrix is there too": lambda tensors: tensors.update({"text.up.weight": np.zeros((31, 6), np.float32)}),
    "codes are of what is not compressed": lambda tensors: tensors.update(
        {f"of.text.up.weight.bias.{part}": tensors[f"text.up.weight.{part}"] for part in ("codes", "scales")}
    ),
    "codes are floats": lambda tensors: tensors.update(
        {"text.up.weight.codes": tensors["text.up.weight.codes"].astype(np.float32)}
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
@pytest.mark.parametrize("fault", FAULTS)
def test_other_codes_and_scales_are_refused(fault: str, weight_dtype: str) -> None:
    config, weights = encode_adapter(rounded_adapter(weight_dtype))
    tensors = load(weights)
    FAULTS[fault](tensors)
    with pytest.raises(AdapterError, match=r"text\.up\.weight"):
        decode_adapter(config, np.frombuffer(save(tensors), np.uint8), "it")


def test_weights_that_are_no_codes_are_not_written_as_such() -> None:
    adapter = random_adapter(FINGERPRINT, 31, 3, **SETTINGS, weight_dtype="int8")
    with pytest.raises(AdapterError, match=r"tensor 'text\.down\.weight': its rows are not int8"):
        encode_adapter(adapter)
    config = json.loads(encode_adapter(rounded_adapter("int8"))[0])
    assert config["weight_dtype"] == "int8"
    with pytest.raises(AdapterError, match="weight_dtype is 'int3', expected one of float32, int8, int4"):
        decode_adapter(json.dumps({**config, "weight_dtype": "int3"}).encode(), np.zeros(0, np.uint8), "it")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "gelu", "nested": True}, "nested is true with activation 'gelu'"),
        ({"rank": 0, "soft_tokens": 2, "bias": False, "weight_dtype": "int8"}, "only a bottleneck is compressed"),
        ({"rank": 2, "bias": False, "input": "ids", "nested": True}, "only a bottleneck is compressed"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        random_adapter(FINGERPRINT, 31, 3, **{**SETTINGS, **settings})
