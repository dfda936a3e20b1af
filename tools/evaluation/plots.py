"""Pictures with two axes of numbers: curves of a training, and answers that are numbers."""

from __future__ import annotations

from collections.abc import Sequence

from adalink.tools.evaluation.charts import svg
from adalink.tools.evaluation.report import CurvePoint, NumberMeasures

_LEFT, _TOP, _RIGHT, _BOTTOM = 52.0, 10.0, 350.0, 190.0
_HEIGHT = _BOTTOM + 26


def curve_chart(lines: Sequence[tuple[str, Sequence[CurvePoint]]], title: str, mark: int | None = None) -> str:
    """Lines over the steps of a training; points of a line are shown where they are few.

    Args:
        lines: class of a line, ``"first"`` or ``"second"``, and its points.
        title: what the picture shows.
        mark: a step with a line of its own.
    """
    points = [point for _, line in lines for point in line]
    across, up = _Scale(0.0, max(point.step for point in points)), _Scale.of([point.value for point in points])
    parts = [_frame(across, up)]
    if mark is not None:
        parts.append(f'<path class="mark" d="M{_x(across, mark):.1f} {_TOP}V{_BOTTOM}"/>')
    for kind, line in lines:
        places = [(_x(across, point.step), _y(up, point.value)) for point in line]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line {kind}" d="M{path}"/>')
        if len(places) <= 12:
            parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    return svg("".join(parts), _HEIGHT, title)


def scatter_chart(measures: NumberMeasures) -> str:
    """Each row's number across and its answer up; on the line they are equal."""
    scale = _Scale.of([value for point in measures.points for value in point])
    corners = (_x(scale, scale.low), _y(scale, scale.low), _x(scale, scale.high), _y(scale, scale.high))
    line = '<path class="grid" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>'.format(*corners)
    dots = "".join(
        f'<circle class="first" cx="{_x(scale, right):.1f}" cy="{_y(scale, said):.1f}" r="3"/>'
        for right, said in measures.points
    )
    return svg(_frame(scale, scale) + line + dots, _HEIGHT, "Answers by the right numbers")


class _Scale:
    """An axis from the lowest to the highest number."""

    def __init__(self, low: float, high: float) -> None:
        spare = (high - low) or abs(high) or 1.0
        self.low, self.high = low, high if high > low else low + spare

    @classmethod
    def of(cls, values: Sequence[float]) -> _Scale:
        """An axis of these values, from 0 where they are not below and 0 is near."""
        low, high = min(values), max(values)
        return cls(0.0 if 0 <= low <= high / 2 else low, high)

    def share(self, value: float) -> float:
        """Where a value is, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def _x(scale: _Scale, value: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * scale.share(value)


def _y(scale: _Scale, value: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * scale.share(value)


def _frame(across: _Scale, up: _Scale) -> str:
    parts = [f'<path class="grid" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>']
    for value, anchor in ((across.low, "start"), (across.high, "end")):
        parts.append(f'<text x="{_x(across, value):.1f}" y="{_BOTTOM + 18}" text-anchor="{anchor}">{value:.4g}</text>')
    for value, y in ((up.low, _BOTTOM), (up.high, _TOP + 8)):
        parts.append(f'<text x="{_LEFT - 6}" y="{y}" text-anchor="end">{value:.3g}</text>')
    return "".join(parts)
