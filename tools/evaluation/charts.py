"""Pictures of an evaluation: SVG in the page, coloured by its style sheet, without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import east_asian_width

from adalink.tools.evaluation.report import CalibrationBin, ItemMeasures, LabelMeasures, TaskReport
from adalink.tools.evaluation.verdict import main_measure
from adalink.tools.terminal.terminal_text import printable

# All pictures are 360 units wide: legible on a phone, where a unit is a pixel.
_WIDTH, _LEFT, _RIGHT = 360, 112, 350
MOST_LABELS = 12


def escape(text: str) -> str:
    """Text of rows, models and names, for HTML: no markup, no control characters, no bidi controls."""
    import html

    return html.escape(printable(text), quote=True)


def measure_chart(tasks: Sequence[TaskReport]) -> str:
    """A bar for each task with its interval, and a mark where its reference is."""
    parts = []
    for index, task in enumerate(tasks):
        top = 8 + index * 44
        _, measure = main_measure(task)
        middle = top + 14
        parts.append(f'<text x="0" y="{top + 10}">{_cut(task.task, _LEFT - 4)}</text>')
        parts.append(f'<text x="0" y="{top + 25}" class="quiet">{_cut(task.variant, _LEFT - 4)}</text>')
        parts.append(_bar(measure.value, top, 28))
        low, high = _x(measure.low), _x(measure.high)
        parts.append(f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 5}v10M{high:.1f} {middle - 5}v10"/>')
        if task.reference is not None:
            where = _x(task.reference.value)
            parts.append(f'<path class="mark" d="M{where:.1f} {top - 4}v36"/>')
    height = 8 + len(tasks) * 44
    return svg("".join(parts) + _axis(height), height + 20, "Share of each task, its interval and its reference")


def class_chart(measures: LabelMeasures | ItemMeasures) -> str:
    """Two bars for each label: precision and recall; the commonest labels only."""
    parts = []
    shown = measures.classes[:MOST_LABELS]
    for index, one in enumerate(shown):
        top = 4 + index * 30
        parts.append(f'<text x="0" y="{top + 15}">{_cut(one.label, _LEFT - 4)}</text>')
        parts.append(_bar(one.precision, top, 10) + _bar(one.recall, top + 12, 10, "second"))
    height = 4 + len(shown) * 30
    return svg("".join(parts) + _axis(height), height + 20, "Precision and recall of each label")


def confusion_chart(measures: LabelMeasures) -> str:
    """Rows by label (down) and answer (across), shaded by the share of the label's rows; the commonest labels only."""
    names = [one.label for one in measures.classes[:MOST_LABELS]]
    cell = (_RIGHT - _LEFT) / len(names)
    height = min(cell, 40)
    top = 20
    parts = []
    for row, name in enumerate(names):
        total = sum(measures.confusion[row])
        y = top + row * height
        parts.append(f'<text x="0" y="{y + height / 2 + 4:.1f}">{_cut(name, _LEFT - 24)}</text>')
        parts.append(f'<text x="{_LEFT + (row + 0.5) * cell:.1f}" y="14" text-anchor="middle">{row + 1}</text>')
        parts.append(
            f'<text x="{_LEFT - 4}" y="{y + height / 2 + 4:.1f}" text-anchor="end" class="quiet">{row + 1}</text>'
        )
        for column in range(len(names)):
            count = measures.confusion[row][column]
            share = count / total if total else 0.0
            kind = "right" if row == column else "wrong"
            x = _LEFT + column * cell
            parts.append(
                f'<rect class="{kind}" x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell - 2:.1f}" '
                f'height="{height - 2:.1f}" fill-opacity="{0.06 + 0.6 * share:.2f}"/>'
            )
            if count:
                parts.append(
                    f'<text x="{x + cell / 2:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="middle">{count}</text>'
                )
    return svg("".join(parts), top + len(names) * height + 4, "Rows by label and answer")


def reliability_chart(bins: Sequence[CalibrationBin]) -> str:
    """How many answers are right, by the probability that they have; on the line they are as good as they say."""
    size, left, top = 200.0, 60.0, 8.0
    parts = [f'<path class="grid" d="M{left} {top}v{size}h{size}M{left} {top + size}L{left + size} {top}"/>']
    most = max(one.rows for one in bins)
    for one in bins:
        x, y = left + size * one.confidence, top + size * (1 - one.accuracy)
        radius = 3 + 7 * (one.rows / most) ** 0.5
        parts.append(f'<circle class="first" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>')
    for share in (0, 50, 100):
        parts.append(
            f'<text x="{left - 6}" y="{top + size * (1 - share / 100) + 4}" text-anchor="end">{share} %</text>'
        )
        parts.append(
            f'<text x="{left + size * share / 100}" y="{top + size + 18}" text-anchor="middle">{share} %</text>'
        )
    return svg("".join(parts), top + size + 26, "Right answers by probability")


def svg(content: str, height: float, title: str) -> str:
    """A picture of 360 units in width; ``title`` is for who does not see it."""
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{title}"><title>{title}</title>'
        f"{content}</svg>"
    )


def _axis(bottom: float) -> str:
    marks = "".join(
        f'<text x="{_x(share / 100):.1f}" y="{bottom + 14}" text-anchor="middle" class="quiet">{share}</text>'
        for share in (0, 25, 50, 75)
    )
    end = f'<text x="{_WIDTH}" y="{bottom + 14}" text-anchor="end" class="quiet">100 %</text>'
    return f'<path class="grid" d="M{_LEFT} 0V{bottom}"/>{marks}{end}'


def _bar(share: float, top: float, height: float, kind: str = "first") -> str:
    width = _x(share) - _LEFT
    return f'<rect class="{kind}" x="{_LEFT}" y="{top}" width="{width:.1f}" height="{height}" rx="2"/>'


def _x(share: float) -> float:
    return _LEFT + share * (_RIGHT - _LEFT)


def _cut(text: str, most: float) -> str:
    """As much of a text as fits, in units of 12 px type; a browser cannot do this in a picture."""
    flat = " ".join(printable(text).split())
    widths = [_letter_width(letter) for letter in flat]
    if sum(widths) <= most:
        return escape(flat)
    room = most - _letter_width("…")
    kept = next(count for count in range(len(flat) + 1) if sum(widths[: count + 1]) > room)
    return escape(f"{flat[:kept].rstrip()}…")


def _letter_width(letter: str) -> float:
    if not letter.isascii():
        return 12.5 if east_asian_width(letter) in "WF" else 8.5
    return 12.0 if letter in "mwMW@%" else 9.0 if letter.isupper() else 3.8 if letter in "iljtfr.,:;'|! " else 7.2
