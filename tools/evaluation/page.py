"""An evaluation as one page: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from adalink.tools.evaluation.charts import (
    accuracy_chart,
    class_chart,
    confusion_chart,
    escape,
    reliability_chart,
)
from adalink.tools.evaluation.evaluate import hints, name_of, percent
from adalink.tools.evaluation.report import Estimate, LabelMeasures, Report, TaskReport

_MOST_ROWS, _MOST_CHARACTERS = 50, 400

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --quiet: #5b6675; --paper: #fff; --line: #d5dae1;
  --first: #2563a8; --second: #c47f17; --mark: #b3261e; --right: #2563a8; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --quiet: #a0abba; --paper: #14181f; --line: #3a4350;
  --first: #6ea8e6; --second: #e2a94f; --mark: #ff8a80; --right: #6ea8e6; --wrong: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.35; margin: 0.5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 0 0 0.25rem; } p, figcaption { margin: 0.25rem 0; }
figcaption, p.quiet { color: var(--quiet); font-size: 0.9rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; min-width: 0; } svg { display: block; width: 100%; max-width: 32rem; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg .quiet { fill: var(--quiet); }
svg path { stroke: var(--ink); fill: none; stroke-width: 1.5; } svg .grid { stroke: var(--line); }
svg .mark { stroke: var(--mark); stroke-dasharray: 4 2; stroke-width: 2; }
.first { fill: var(--first); fill-opacity: 0.75; } .second { fill: var(--second); fill-opacity: 0.75; }
.right { fill: var(--right); } .wrong { fill: var(--wrong); }
.key { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; }
.key.first { background: var(--first); } .key.second { background: var(--second); }
.key.mark { background: var(--mark); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; margin: 0.5rem 0; }
th, td { text-align: left; padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: break-word; max-width: 24rem; }
.number { text-align: right; white-space: nowrap; } .text { min-width: 14rem; overflow-wrap: anywhere; }
summary { cursor: pointer; margin: 0.75rem 0; }
"""


def render_page(report: Report) -> str:
    """The page as HTML; all that rows, models and files say is escaped."""
    many = "" if len(report.tasks) == 1 else _comparison(report.tasks)
    tasks = "".join(_task(task, "" if task.verdict == report.verdict else task.verdict) for task in report.tasks)
    verdict = escape(report.verdict).replace(" %", "&nbsp;%")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Evaluation of {escape(report.base)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{verdict}</h1>"
        f'<p class="quiet">{escape(report.base)}, rows of {escape(report.data)}. Intervals are of 95 % confidence.</p>'
        f"{many}{tasks}"
        f'<p class="quiet">Rows: sha256 {escape(report.data_sha256)}. Written by adalink eval, AdaLink Kit '
        f"{escape(report.kit_version)}.</p></body></html>\n"
    )


def _comparison(tasks: Sequence[TaskReport]) -> str:
    rows = [
        (
            task.task,
            task.variant,
            _estimate(task.accuracy),
            "" if task.labels is None else f"{task.labels.macro_f1.value:.3f}",
            "" if task.reference is None else f"{percent(task.reference.accuracy)}, {task.reference.name}",
            f"{task.speed.median_ms:.1f}",
        )
        for task in tasks
    ]
    table = _table(("task", "variant", "accuracy", "macro F1", "reference", "ms a row"), rows, numbers=(2, 3, 5))
    return f"<h2>Side by side</h2>{_accuracy_figure(tasks)}{table}"


def _accuracy_figure(tasks: Sequence[TaskReport]) -> str:
    mark = ""
    if any(task.reference for task in tasks):
        names = sorted({task.reference.name for task in tasks if task.reference})
        mark = f', <span class="key mark"></span> the reference: {escape(", ".join(names))}'
    return _figure("Accuracy", accuracy_chart(tasks), f"With its interval{mark}.")


def _task(task: TaskReport, verdict: str) -> str:
    pictures, tables = [_accuracy_figure([task])], ""
    notes = []
    if task.labels is not None:
        pictures += _label_figures(task.labels)
        tables = _label_table(task.labels)
        notes = hints(task.labels)
    if task.cut:
        notes.append(f"{task.cut} texts were cut: they are longer than the task takes")
    noted = "".join(f"<li>{escape(note)}</li>" for note in notes)
    speed = task.speed
    return (
        f"<h2>{escape(name_of(task))}</h2><p>{escape(verdict)}</p>{f'<ul>{noted}</ul>' if noted else ''}"
        f'<div class="pictures">{"".join(pictures)}</div>{tables}{_wrong_rows(task)}'
        f"<p>One row alone takes {speed.median_ms:.1f} ms in the median ({speed.p95_ms:.1f} ms for 95 %). All rows "
        f"together: {speed.rows_per_second:.1f} rows and {speed.tokens_per_second:.0f} tokens a second.</p>"
    )


def _label_figures(labels: LabelMeasures) -> list[str]:
    shown = "" if len(labels.classes) <= 12 else f" The 12 commonest of {len(labels.classes)} labels."
    return [
        _figure(
            "Labels",
            class_chart(labels),
            '<span class="key first"></span> precision: share of right answers among those that say it.<br>'
            f'<span class="key second"></span> recall: share of its rows that are found.{shown}',
        ),
        _figure(
            "What is taken for what",
            confusion_chart(labels),
            f"Rows have the label on the left, answers the one of the number above.{shown}",
        ),
        _figure(
            "Can probabilities be believed?",
            reliability_chart(labels.bins),
            "Probability across, share of right answers up. On the line they agree; they are "
            f"{percent(labels.calibration_error)} apart in the mean.",
        ),
    ]


def _figure(title: str, chart: str, caption: str) -> str:
    return f"<figure><h3>{title}</h3>{chart}<figcaption>{caption}</figcaption></figure>"


def _label_table(labels: LabelMeasures) -> str:
    rows = [
        (one.label, str(one.rows), f"{one.precision:.3f}", f"{one.recall:.3f}", f"{one.f1:.3f}")
        for one in labels.classes
    ]
    table = _table(("label", "rows", "precision", "recall", "F1"), rows, numbers=(1, 2, 3, 4))
    f1 = labels.macro_f1
    return (
        f"<details><summary>Precision, recall and F1 of {len(rows)} labels; macro F1 {f1.value:.3f} "
        f"({f1.low:.3f} to {f1.high:.3f})</summary>{table}</details>"
    )


def _wrong_rows(task: TaskReport) -> str:
    if not task.wrong:
        return "<p>No row is wrong.</p>"
    rows = [
        (
            str(row.line),
            "" if row.probability is None else f"{row.probability:.2f}",
            _shorten(row.answer),
            _shorten(row.expected),
            _shorten(row.text),
        )
        for row in task.wrong[:_MOST_ROWS]
    ]
    table = _table(("line", "probability", "answer", "expected", "text"), rows, numbers=(0, 1), text=4)
    more = f", the {_MOST_ROWS} most certain here" if len(task.wrong) > _MOST_ROWS else ", the most certain first"
    return f"<details open><summary>{len(task.wrong)} wrong rows{more}</summary>{table}</details>"


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), text: int | None = None
) -> str:
    kinds = ["number" if place in numbers else "text" if place == text else "" for place in range(len(columns))]
    head = "".join(f'<th class="{kind}">{name}</th>' for kind, name in zip(kinds, columns, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _shorten(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def _estimate(one: Estimate) -> str:
    return f"{percent(one.value)} ({100 * one.low:.1f} to {100 * one.high:.1f})"
