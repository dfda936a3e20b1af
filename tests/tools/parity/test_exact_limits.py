"""Each limit of parity is reached exactly: just below it passes, just above it fails, and one component is enough.

Outputs are made here, and what they must give is worked out here, in plain Python.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.runtime import random_adapter

from adalink.runtime.arrays import Array
from adalink.runtime.storage.adapter import Adapter, make_adapter
from adalink.tools.parity.checks.adapter import check_vocabulary, check_weights
from adalink.tools.parity.checks.generation import GeneratedRow, Verdict, check_generation, judge
from adalink.tools.parity.checks.outputs import Rows, compare_outputs
from adalink.tools.parity.checks.swap import check_mixed_outputs
from adalink.tools.parity.reference.noise_floor import Outputs, limit_of, noise_of

FINGERPRINT = "sha256:" + "0" * 64
JUST = 1e-9
NOISE = 1e-3
# 16 x the noise, of float32 (docs/concepts/parity.md).
LIMIT = 16 * NOISE


def make_reference(values: list[Array]) -> Any:
    """PyTorch that gives these logits, one array a row, each with the same noise at every position."""
    rows = iter(values)

    def outputs(*_: object, **__: object) -> Outputs:
        logits = next(rows)
        return Outputs({"logits": logits}, {"logits": np.full(len(logits), NOISE)})

    return SimpleNamespace(
        outputs=outputs,
        base=SimpleNamespace(kind="decoder"),
        noise_source="float32",
        limit=lambda noise, typical: limit_of(noise, typical, "float32"),
    )


def make_deployment(values: list[Array]) -> Any:
    rows = iter(values)
    base = SimpleNamespace(kind="decoder", embedding_dtype="float64")
    return SimpleNamespace(manifest=SimpleNamespace(base=base), run=lambda **_: {"logits": np.stack([next(rows)])})


def compare(ours: list[Array], theirs: list[Array]) -> dict[str, Any]:
    ids = [[1] * len(row) for row in ours]
    comparison = compare_outputs("base", make_deployment(ours), make_reference(theirs), None, Rows(ids))
    assert [limits.tolist() for limits in comparison.limits["logits"]] == [[LIMIT] * len(row) for row in ours]
    return {check.name: check for check in comparison.checks}


@pytest.mark.parametrize("positions", [4, 7, 9, 16])
def test_outputs_of_more_or_fewer_positions(positions: int) -> None:
    """Eight are compared at a time; what lies beyond is not left out."""
    theirs = np.random.default_rng(0).normal(size=(8, 5))
    ours = np.resize(theirs, (positions, 5))
    comparison = compare_outputs("base", make_deployment([ours]), make_reference([theirs]), None, Rows([[1] * 8]))
    assert not any(check.passed for check in comparison.checks if check.name in ("base/logits", "base/kl"))


def test_noise_that_is_another_model_passes_nothing() -> None:
    """A float64 model that computes something else would widen each limit."""
    logits = np.random.default_rng(0).normal(size=(6, 5))
    rounded, other = logits + 1e-4, logits.copy()
    other[3] += 0.02
    np.testing.assert_allclose(noise_of({"logits": logits}, {"logits": rounded})["logits"], 1e-4, rtol=1e-9)
    noise = noise_of({"logits": logits}, {"logits": other})["logits"]
    assert np.isnan(noise).tolist() == [False, False, False, True, False, False]
    assert np.isnan(limit_of(noise, float(np.percentile(noise, 90)), "float32")).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_limit_is_sixteen_times_the_larger_noise(dtype: str) -> None:
    scale = {"float32": 1.0, "float16": 2.0**13, "bfloat16": 2.0**16}[dtype]
    found = limit_of(np.array([1e-6, 5e-6]), 2e-6, dtype)
    np.testing.assert_allclose(found, [16 * scale * 2e-6, 16 * scale * 5e-6], rtol=1e-12)


@pytest.mark.parametrize(("factor", "passed"), [(1 - JUST, True), (1 + JUST, False), (99.0, False)])
def test_one_logit_of_one_position_may_deviate_by_the_limit(factor: float, passed: bool) -> None:
    theirs = np.linspace(0, 3, 20).reshape(4, 5)
    ours = theirs.copy()
    ours[2, 1] -= factor * LIMIT
    checks = compare([theirs, ours], [theirs, theirs])
    assert checks["base/logits"].passed is passed
    assert checks["base/logits"].measured == pytest.approx(factor * LIMIT)
    assert "prompt 1, position 2" in checks["base/logits"].detail


@pytest.mark.parametrize(
    ("margin", "decisive", "ties"), [(0, 0, 0), (2 - JUST, 0, 1), (2 + JUST, 1, 0), (2.5, 1, 0), (150, 1, 0)]
)
def test_another_top_token_is_a_tie_up_to_twice_the_limit(margin: float, decisive: int, ties: int) -> None:
    """The engine prefers token 0; PyTorch prefers token 2 by so many limits."""
    theirs = np.array([[1.0, 0.0, 1.0 + margin * LIMIT], [0.0, 5.0, 0.0]])
    ours = np.array([[1.0 + 10 * LIMIT, 0.0, 1.0], [0.0, 5.0, 0.0]])
    check = compare([ours], [theirs])["base/top1"]
    assert (check.measured, check.limit, check.passed) == (decisive, 0, decisive == 0)
    agreeing = 2 - decisive - ties
    assert f"{agreeing} of 2 top-1 tokens agree, {ties} are ties, {decisive} differ" in check.detail


def divergence(change: float) -> float:
    """KL(p || q) of two tokens with logits (0, 0) and (change, 0), in plain Python."""
    q = [math.exp(change) / (math.exp(change) + 1), 1 / (math.exp(change) + 1)]
    return sum(0.5 * math.log(0.5 / each) for each in q)


@pytest.mark.parametrize(("factor", "passed"), [(1 - 1e-6, True), (1 + 1e-6, False), (50.0, False)])
def test_the_divergence_may_be_half_the_square_of_the_limit(factor: float, passed: bool) -> None:
    """A change of all logits by less than the limit cannot diverge by more."""
    allowed = LIMIT**2 / 2
    low, high = 0.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) < factor * allowed else (low, middle)
    theirs = np.array([[1.0, 1.0], [0.0, 0.0]])
    check = compare([np.array([[1.0, 1.0], [low, 0.0]])], [theirs])["base/kl"]
    assert check.passed is passed
    assert check.measured == pytest.approx(divergence(low), rel=1e-9)
    assert check.limit == pytest.approx(allowed, rel=1e-7)


def judged(tokens: list[int], ours: Array, theirs: Array) -> Verdict:
    row = GeneratedRow([7, 8], tokens, ours, "")
    generator: Any = SimpleNamespace(text=lambda token: f"<{token}>")
    return judge(make_reference([np.concatenate([np.full((1, ours.shape[1]), 9.0), theirs])]), generator, row, NOISE)


def test_a_step_deviates_by_its_worst_component() -> None:
    theirs = np.array([[3.0, 0.0, 1.0], [0.0, 4.0, 1.0]])
    ours = theirs.copy()
    ours[1] += [0.0, 1e-4, -1.5 * LIMIT]
    verdict = judged([0, 1], ours, theirs)
    np.testing.assert_allclose(verdict.deviations, [0, 1.5 * LIMIT])
    np.testing.assert_allclose(verdict.limits, [LIMIT, LIMIT])
    steps, tokens = check_generation("base", [verdict])
    assert (steps.passed, tokens.passed) == (False, True)
    ours[1, 2] += 0.6 * LIMIT
    assert check_generation("base", [judged([0, 1], ours, theirs)])[0].passed


@pytest.mark.parametrize(
    ("margin", "ties", "wrong"), [(0, 0, False), (2 - JUST, 1, False), (2 + JUST, 0, True), (150, 0, True)]
)
def test_a_generated_token_is_a_tie_up_to_twice_the_limit(margin: float, ties: int, wrong: bool) -> None:
    theirs = np.array([[3.0, 0.0, 1.0], [0.0, 4.0, 4.0 + margin * LIMIT]])
    verdict = judged([0, 1], theirs, theirs)
    assert verdict.ties == ties
    assert bool(verdict.wrong) is wrong
    assert verdict.wrong.startswith("step 1: '<1>', PyTorch '<2>' by ") is wrong
    assert check_generation("base", [verdict])[1].passed is not wrong


def test_generated_logits_that_are_not_numbers_fail() -> None:
    theirs = np.array([[3.0, 0.0], [0.0, 4.0]])
    ours = theirs.copy()
    ours[0, 1] = np.nan
    assert not check_generation("base", [judged([0, 1], ours, theirs)])[0].passed
    assert judged([0, 1], theirs, np.where(theirs == 4.0, np.nan, theirs)).wrong


@pytest.mark.parametrize(("factor", "passed"), [(1 - JUST, True), (1 + JUST, False), (80.0, False), (np.nan, False)])
def test_a_row_of_a_mixed_batch_deviates_by_its_worst_component(factor: float, passed: bool) -> None:
    alone = np.linspace(-1, 1, 12).reshape(3, 4)
    together = np.stack([alone] * 8)
    together[5, 1, 2] += factor * LIMIT
    base = SimpleNamespace(kind="decoder", pad_token_id=0, embedding_dtype="float64", vocab_size=1 << 20)

    def run(**given: Any) -> dict[str, Array]:
        return {"logits": together if len(given["input_ids"]) == 8 else alone[None]}

    deployment: Any = SimpleNamespace(manifest=SimpleNamespace(base=base), tasks=["alpha"], run=run)
    one: Any = SimpleNamespace(limits={"logits": [np.full(3, LIMIT)]})
    # Logits of nine positions of so large a vocabulary are not within the memory set aside: that row is left out.
    (check,) = check_mixed_outputs(deployment, [[4, 5, 6], [7] * 9], {None: one, "alpha": one})
    assert check.passed is passed
    assert "row 5 (alpha), position 1" in check.detail


WIDTH = 24


def compute(adapter: Adapter, x: Array, slope: float = 0.0) -> Array:
    """The adapter in numpy, float64, from the method's formula: a ReLU, or one that leaks on its dead side."""
    down, up = (adapter.weights[f"text.{name}.weight"].astype(np.float64) for name in ("down", "up"))
    inner = x.astype(np.float64) @ down.T
    result: Array = (x + np.where(inner > 0, inner, slope * inner) @ up.T).astype(np.float32)
    return result


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    """A ReLU whose first unit is dead for every unit vector, and its second for every negative one."""
    made = random_adapter(FINGERPRINT, WIDTH, 3, rank=4, activation="relu", bias=False, scope="all")
    weights = {name: value.copy() for name, value in made.weights.items()}
    for unit, sign in enumerate((-1, 1)):
        weights["text.down.weight"][unit] = sign * (np.abs(weights["text.down.weight"][unit]) + 0.1)
    return make_adapter(made.config, weights)


def other_up(adapter: Adapter, row: int, unit: int) -> Adapter:
    weights = {name: value.copy() for name, value in adapter.weights.items()}
    weights["text.up.weight"][row, unit] *= 1.01
    return make_adapter(adapter.config, weights)


def test_the_weights_as_they_are_pass(adapter: Adapter) -> None:
    check = check_weights("a", "bank", lambda x, *_: compute(adapter, x), adapter, "float32")
    assert check.passed
    assert 0 < check.measured <= 1


@pytest.mark.parametrize("unit", range(4))
def test_a_weight_behind_a_dead_side_is_found(adapter: Adapter, unit: int) -> None:
    changed = other_up(adapter, 7, unit)
    check = check_weights("a", "bank", lambda x, *_: compute(changed, x), adapter, "float32")
    assert not check.passed
    assert check.detail.endswith("component 7")


def test_an_activation_that_leaks_is_found(adapter: Adapter) -> None:
    check = check_weights("a", "bank", lambda x, *_: compute(adapter, x, 0.01), adapter, "float32")
    assert not check.passed


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_component_that_is_no_number_is_found(adapter: Adapter, value: float) -> None:
    """One component of one token in the sweep of the vocabulary, and of one unit vector in that of the weights."""
    table = np.random.default_rng(1).normal(size=(40, WIDTH)).astype(np.float32)

    def adapt(x: Array, modality: str, ids: Array | None) -> Array:
        result = compute(adapter, x)
        if len(x[0]) == (40 if ids is not None else WIDTH):
            result[0, 11, 5] = value
        return result

    base = SimpleNamespace(modalities=("text",), embedding_dtype="float32", vocab_size=40, tokenizer=None)
    deployment: Any = SimpleNamespace(
        manifest=SimpleNamespace(base=base), input_embeddings=lambda ids: table[np.asarray(ids)]
    )
    check = check_vocabulary("a", "bank", adapt, deployment, adapter)
    assert (check.passed, check.measured) == (False, math.inf)
    assert "token 11, component 5" in check.detail
    check = check_weights("a", "bank", adapt, adapter, "float32")
    assert (check.passed, check.measured) == (False, math.inf)
    assert "unit vector 11, component 5" in check.detail


def test_a_missed_bound_of_zero_is_infinitely_wrong(adapter: Adapter) -> None:
    """Of a modality without weights nothing may change: there 0 / 0 is right and anything else is not."""
    config = msgspec.structs.replace(adapter.config)
    assert config.modalities == ("text",)
    base = SimpleNamespace(modalities=("image",), embedding_dtype="float32", vocab_size=3, tokenizer=None)
    table = np.ones((3, WIDTH), np.float32)
    deployment: Any = SimpleNamespace(
        manifest=SimpleNamespace(base=base), input_embeddings=lambda ids: table[np.asarray(ids)]
    )
    assert check_vocabulary("a", "bank", lambda x, *_: x, deployment, adapter).measured == 0
    assert check_vocabulary("a", "bank", lambda x, *_: x + np.float32(1e-7), deployment, adapter).measured == math.inf
