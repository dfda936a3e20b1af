"""SamplingParams against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from adalink.runtime.errors import RequestError
from adalink.runtime.sampling.sampler import SamplingParams


def logits(seed: int = 0, size: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=3, size=size).astype(np.float32)


def test_greedy_is_argmax() -> None:
    for seed in range(5):
        values = logits(seed)
        assert SamplingParams().choose(values, np.random.default_rng(0)) == int(np.argmax(values))


def test_distribution_is_the_softmax_of_scaled_logits() -> None:
    values = logits()
    exact = np.exp(values.astype(np.float64) / 0.7)
    np.testing.assert_allclose(SamplingParams(temperature=0.7).distribution(values), exact / exact.sum(), rtol=1e-12)


def test_top_k_keeps_exactly_the_likeliest() -> None:
    kept = np.flatnonzero(SamplingParams(temperature=1.3, top_k=5).distribution(logits()))
    assert set(kept) == set(np.argsort(-logits())[:5])


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float) -> None:
    plain = SamplingParams(temperature=1.0).distribution(logits())
    kept = np.flatnonzero(SamplingParams(temperature=1.0, top_p=top_p).distribution(logits()))
    assert plain[kept].sum() >= top_p
    assert plain[kept].sum() - plain[kept].min() < top_p
    assert plain[kept].min() >= np.delete(plain, kept).max()


def test_a_set_that_reaches_p_exactly_is_enough() -> None:
    assert SamplingParams(temperature=1.0, top_p=0.5).distribution(np.zeros(4)).tolist() == [0.5, 0.5, 0, 0]


def test_top_p_is_a_share_of_what_top_k_keeps() -> None:
    values = np.log([2.0, 8.0, 1.0, 4.0])  # of the two likeliest the first has two thirds
    for top_p, expected in ((0.6, [0, 1, 0, 0]), (0.7, [0, 2 / 3, 0, 1 / 3])):
        found = SamplingParams(temperature=1.0, top_k=2, top_p=top_p).distribution(values)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_draws_follow_the_distribution() -> None:
    sampling = SamplingParams(temperature=1.0)
    values = logits(size=6)
    generator = np.random.default_rng([11, 0])
    draws = [sampling.choose(values, generator) for _ in range(4000)]
    expected = sampling.distribution(values)
    assert draws[:50] == np.random.default_rng([11, 0]).choice(6, 50, p=expected).tolist()
    observed = np.bincount(draws, minlength=6) / len(draws)
    assert np.abs(observed - expected).max() < 5 * np.sqrt(0.25 / len(draws))


@pytest.mark.parametrize("temperature", [1e-300, 1e-310, 5e-324])
@pytest.mark.parametrize("top_k", [None, 3])
def test_the_smallest_temperatures_take_the_likeliest(temperature: float, top_k: int | None) -> None:
    sampling = SamplingParams(temperature=temperature, top_k=top_k)
    for values in (logits(), -np.abs(logits()), np.where(logits() < 0, -np.inf, logits())):
        np.testing.assert_array_equal(sampling.distribution(values), np.arange(50) == values.argmax())
        assert sampling.choose(values, np.random.default_rng(0)) == values.argmax()


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}],
)
def test_bad_settings_are_named(settings: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(settings))):
        SamplingParams(**settings)  # type: ignore[arg-type]
