"""Sides measured in turns, for as many rounds as the time allows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

_FEWEST = 3


def in_turns(sides: Mapping[str, Callable[[], float]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Measure each side once a round, in an order that is reversed every round, after a round that does not count.

    Args:
        sides: what measures each side; returns seconds.
        rounds: most rounds.
        seconds: no round begins after these, but for the first three.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    ends = time.monotonic() + seconds
    for number in range(-1, rounds):
        if number >= _FEWEST and time.monotonic() > ends:
            break
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in order:
            value = sides[name]()
            if number >= 0:
                found[name].append(value)
    return found


def milliseconds(found: Mapping[str, list[float]], over: str) -> dict[str, float]:
    """Medians of the sides, and the median of each round's own ratio to the side ``over``."""
    result: dict[str, float] = {"rounds": len(found[over])}
    below = np.array(found[over])
    for name, values in found.items():
        result[f"{name}_ms"] = 1e3 * float(np.median(values))
        if name != over:
            result[f"{name}_ratio"] = float(np.median(np.array(values) / below))
    return result


def microseconds(work: Callable[[int], object], times: int, seconds: float) -> dict[str, float]:
    """Time calls with 0, 1, ... one by one: how many there were, the median and the 99th percentile."""
    ends, taken = time.monotonic() + seconds, []
    for index in range(-100, times):
        begun = time.perf_counter()
        work(index)
        if index >= 0:
            taken.append(time.perf_counter() - begun)
            if index % 256 == 0 and time.monotonic() > ends:
                break
    p50, p99 = np.percentile(np.array(taken), (50, 99))
    return {"times": len(taken), "us_p50": 1e6 * float(p50), "us_p99": 1e6 * float(p99)}
