"""Numbers as people read them on a plot, and labels that do not cover each other."""

from __future__ import annotations

from collections.abc import Sequence

_DURATIONS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_SIZES = ((2**40, "TB"), (2**30, "GB"), (2**20, "MB"), (2**10, "kB"))


def duration_text(seconds: float) -> str:
    """Such as ``8.8 µs``, ``74 ms`` or ``2.3 s``: two digits, or all before the point."""
    scale, unit = next(((scale, unit) for scale, unit in _DURATIONS if seconds >= 0.9995 * scale), _DURATIONS[-1])
    return f"{_two_digits(seconds / scale)} {unit}"


def size_text(size_bytes: float) -> str:
    """Such as ``668 MB`` or ``1.5 GB``, 1 MB being 2**20 bytes as in the tables."""
    scale, unit = next(((scale, unit) for scale, unit in _SIZES if size_bytes >= 0.9995 * scale), _SIZES[-1])
    return f"{_two_digits(size_bytes / scale)} {unit}"


def tick_text(text: str) -> str:
    """A round number's text without its zero: ``1 GB`` for ``1.0 GB``."""
    return text.replace(".0 ", " ")


def duration_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from ``low`` to ``high`` seconds."""
    return [10.0**power for power in range(-9, 5) if low <= 10.0**power <= high]


def size_ticks(low: float, high: float) -> list[float]:
    """1, 10 and 100 of every unit from ``low`` to ``high`` bytes."""
    ticks = [float(scale * step) for scale, _ in reversed(_SIZES) for step in (1, 10, 100)]
    return [tick for tick in ticks if low <= tick <= high]


def thin(ticks: Sequence[float], most: int) -> list[float]:
    """Every n-th tick, so that at most ``most`` are left."""
    return list(ticks[:: -(-len(ticks) // most)]) if ticks else []


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move places apart until neighbours are ``gap`` or more from each other, each group around its mean.

    Args:
        places: where labels would stand, in any order.
        gap: the height of a label.

    Returns:
        The new places, in the order of ``places``; the order along the axis is kept.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _start(groups[-1], places, gap) < _start(groups[-2], places, gap) + gap * len(
            groups[-2]
        ):
            last = groups.pop()
            groups[-1] += last
    moved = list(places)
    for group in groups:
        start = _start(group, places, gap)
        for step, index in enumerate(group):
            moved[index] = start + step * gap
    return moved


def _start(group: Sequence[int], places: Sequence[float], gap: float) -> float:
    """Place of a group's first label where the group stands around the mean of its own places."""
    return sum(places[index] for index in group) / len(group) - gap * (len(group) - 1) / 2


def _two_digits(value: float) -> str:
    if value >= 9.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"
