"""How cost grows: the fit, the cost model, the table and the plots of a stored run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from helpers.runtime import build

from adalink.runtime.storage.manifest_io import read_manifest
from benchmarks.slopes import LAWS, Model, cost_model, fit, slope

XS = (1, 10, 100, 1000)
MODEL = Model(weight_bytes=538e6, cache_bytes=46080, parameters=134.5e6, attention=34560, bandwidth=40e9, rate=200e9)


@pytest.mark.parametrize("power", [-1, 0, 0.5, 1, 2])
def test_slope_of_a_power_is_its_exponent(power):
    assert slope(XS, [3.7 * x**power for x in XS]) == pytest.approx(power, abs=1e-12)


def test_slope_is_the_least_squares_line():
    """By hand: through (0, 0), (1, 1), (2, 1) in log10 the best line rises by a half."""
    assert slope((1, 10, 100), (1, 10, 10)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("xs", "ys", "message"),
    [((1,), (1,), "two points"), ((2, 2), (1, 3), "two points"), ((1, 2), (0, 1), "positive"), ((1, 2), (1,), "two")],
)
def test_slope_refuses_what_has_none(xs, ys, message):
    with pytest.raises(ValueError, match=message):
        slope(xs, ys)


def test_a_cost_that_grows_with_the_tasks_shows():
    flat = {x: {"prefill_ms": 60, "decode_ms": 13, "swap_us": 9, "memory_bytes": 75e3 * x} for x in XS}
    found = fit("tasks", flat, MODEL)
    assert {name: round(curve["fitted"], 6) for name, curve in found.items()} == {
        "prefill_ms": 0,
        "decode_ms": 0,
        "swap_us": 0,
        "memory_bytes": 1,
    }
    assert all(curve["fitted"] == pytest.approx(curve["expected"], abs=1e-9) for curve in found.values())
    # Planted: a swap that searches a list of the tasks.
    searched = {x: {**point, "swap_us": 9 + 0.5 * x} for x, point in flat.items()}
    assert fit("tasks", searched, MODEL)["swap_us"]["fitted"] > 0.3


def test_fits_begin_where_the_law_does():
    points = {
        x: {"prefill_ms": 60, "decode_ms": 13, "swap_us": 8 if x < 128 else x / 16, "memory_bytes": 4e3 * x}
        for x in (1, 16, 128, 256, 512)
    }
    found = fit("rank", points, MODEL)["swap_us"]
    assert (found["fitted"], found["expected"], found["from"]) == (pytest.approx(1), 1, 128)


def test_points_that_are_missing_leave_a_gap_and_not_a_guess():
    points = {1: {"prefill_ms": 60, "decode_ms": 13, "swap_us": 8, "memory_bytes": 0.0}}
    assert fit("tasks", points, MODEL)["memory_bytes"] == {
        "fitted": None,
        "expected": None,
        "from": 0,
        "because": LAWS["tasks"]["memory_bytes"].because,
    }


def test_the_cost_model_goes_from_reading_to_computing():
    reading = 538e6 / 40e9
    assert MODEL.step_s(1, 0) == pytest.approx(reading)
    assert MODEL.step_s(64, 0) == pytest.approx(64 * 134.5e6 / 200e9)
    assert MODEL.prefill_s(1, 1) == pytest.approx(reading)
    # Quadratic in the end: twice the length takes nearly four times as long.
    assert math.log2(MODEL.prefill_s(1, 2**21) / MODEL.prefill_s(1, 2**20)) == pytest.approx(2, abs=0.01)


def test_the_cost_model_by_hand():
    """A step reads the weights once and each row's cache; a token of a prompt looks at half of it on average."""
    model = Model(weight_bytes=100.0, cache_bytes=3.0, parameters=7.0, attention=2.0, bandwidth=10.0, rate=1e9)
    assert model.step_s(4, 50) == pytest.approx((100 + 4 * 50 * 3) / 10)
    slow = replace(model, rate=0.5)
    assert slow.step_s(4, 50) == pytest.approx(4 * (7 + 50 * 2) / 0.5)
    assert slow.prefill_s(3, 20) == pytest.approx(3 * 20 * (7 + 10 * 2) / 0.5)


def test_the_cost_model_of_a_base(tmp_path):
    """Of what the manifest says: float32 weights in files beside the graph, keys and values of each layer."""
    manifest = read_manifest(build("llama", tmp_path).folder)
    (variant,) = manifest.variants.values()
    weights = sum((tmp_path / "deployment" / path).stat().st_size for path in variant.files if path.endswith(".data"))
    model = cost_model(manifest, tokens=256, prefill_s=0.5, gb_s=36.0)
    assert weights > 0
    assert (model.weight_bytes, model.parameters) == (weights, weights / 4)
    assert model.cache_bytes == 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    assert model.attention == 2 * 2 * 48  # products with keys and with values, layers, width
    assert model.bandwidth == 36e9
    assert model.prefill_s(1, 256) >= 0.5 == pytest.approx(256 * model.parameters / model.rate)
