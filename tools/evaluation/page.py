"""An evaluation as one page: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from adalink.tools.evaluation.charts import (
    MOST_LABELS,
    class_chart,
    confusion_chart,
    escape,
    measure_chart,
    reliability_chart,
)
from adalink.tools.evaluation.plots import curve_chart, scatter_chart
from adalink.tools.evaluation.report import (
    ClassMeasures,
    ItemMeasures,
    LabelMeasures,
    NumberMeasures,
    Report,
    TaskReport,
    TrainingCurves,
    WrongRow,
)
from adalink.tools.evaluation.verdict import main_measure, name_of, percent, show_measure, show_reference

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
.pictures { columns: 22rem; column-gap: 1.5rem; }
figure { margin: 0 0 1.5rem; break-inside: avoid; } svg { display: block; width: 100%; max-width: 28rem; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg .quiet { fill: var(--quiet); }
svg path { stroke: var(--ink); fill: none; stroke-width: 1.5; } svg .grid { stroke: var(--line); }
svg .line { fill: none; fill-opacity: 1; stroke-width: 2; } svg .line.first { stroke: var(--first); }
svg .line.second { stroke: var(--second); } svg .mark { stroke: var(--mark); stroke-dasharray: 4 2; stroke-width: 2; }
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
@media (max-width: 40rem) { .cards thead { display: none; } .cards tr { display: block; padding: 0.5rem 0;
  border-bottom: 1px solid var(--line); } .cards td { display: block; max-width: none; padding: 0.1rem 0; border: 0;
  text-align: left; overflow-wrap: anywhere; white-space: normal; }
  .cards td:empty { display: none; } .cards td::before { content: attr(data-name) ": "; color: var(--quiet); } }
"""


def render_page(report: Report) -> str:
    """The page as HTML; all that rows, models and files say is escaped."""
    many = "" if len(report.tasks) == 1 else _comparison(report.tasks)
    curves = "" if report.training is None else _curve_figures(report.training)
    tasks = "".join(_task(task, task.verdict.removeprefix(report.verdict), curves) for task in report.tasks)
    verdict = escape(report.verdict).replace(" %", "&nbsp;%")
    verb = "eval" if report.training is None else "train"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Evaluation of {escape(report.base)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{verdict}</h1>"
        f'<p class="quiet">{escape(report.base)}, rows of {escape(report.data)}. Intervals are of 95 % confidence.</p>'
        f"{many}{tasks}"
        f'<p class="quiet">Rows: {escape(report.data_sha256)}. Written by adalink {verb}, AdaLink Kit '
        f"{escape(report.kit_version)}.</p></body></html>\n"
    )


def _comparison(tasks: Sequence[TaskReport]) -> str:
    rows = [
        (
            task.task,
            task.variant,
            show_measure(task),
            "" if task.labels is None else f"{task.labels.macro_f1.value:.3f}",
            "" if task.reference is None else f"{show_reference(task)}, {task.reference.name}",
            "" if task.speed is None else f"{task.speed.median_ms:.1f}",
        )
        for task in tasks
    ]
    columns = ("task", "variant", "result", "macro F1", "reference", "ms a row")
    table = _table(columns, rows, numbers=(2, 3, 5), cards=True)
    return f"<h2>Side by side</h2>{_measure_figure(tasks)}{table}"


def _measure_figure(tasks: Sequence[TaskReport]) -> str:
    """Shares alone: an error has no scale that other tasks have."""
    shares = [task for task in tasks if task.numbers is None]
    if not shares:
        return ""
    mark = ""
    if any(task.reference for task in shares):
        names = sorted({task.reference.name for task in shares if task.reference})
        mark = f', <span class="key mark"></span> the reference: {escape(", ".join(names))}'
    title = " and ".join(sorted({main_measure(task)[0] for task in shares}))
    return _figure(title[:1].upper() + title[1:], measure_chart(shares), f"With its interval{mark}.")


def _task(task: TaskReport, verdict: str, curves: str) -> str:
    pictures, tables = [_measure_figure([task])], ""
    if task.labels is not None:
        pictures += _label_figures(task.labels)
        tables = _label_table(task.labels)
    if task.items is not None and task.items.classes:
        pictures.append(_class_figure(task.items))
        tables = _item_table(task)
    if task.numbers is not None:
        caption = "The row's number across, the answer up. On the line they agree."
        pictures.append(_figure("Answers", scatter_chart(task.numbers), caption))
        tables = _number_table(task.numbers)
    noted = "".join(f"<li>{escape(note)}</li>" for note in task.notes)
    return (
        f"<h2>{escape(name_of(task))}</h2>{f'<p>{escape(verdict)}</p>' if verdict else ''}"
        f"{f'<ul>{noted}</ul>' if noted else ''}"
        f'<div class="pictures">{"".join(pictures)}{curves}</div>{tables}{_wrong_rows(task)}{_speed(task)}'
    )


def _speed(task: TaskReport) -> str:
    speed = task.speed
    if speed is None:
        return ""
    return (
        f"<p>One row alone takes {speed.median_ms:.1f} ms in the median ({speed.p95_ms:.1f} ms for 95 %). All rows "
        f"together: {speed.rows_per_second:.1f} rows and {speed.tokens_per_second:.0f} tokens a second.</p>"
    )


def _curve_figures(curves: TrainingCurves) -> str:
    """Curves of the training."""
    lines = [(kind, points) for kind, points in (("first", curves.loss), ("second", curves.eval_loss)) if points]
    if not lines:
        return ""
    best = "" if curves.best_step is None else f', <span class="key mark"></span> the best step, {curves.best_step}'
    second = f', <span class="key second"></span> {curves.eval_rows}' if curves.eval_loss else ""
    caption = f'<span class="key first"></span> training rows{second}{best}. Steps across.'
    figures = _figure("Loss in training", curve_chart(lines, "Loss by step", curves.best_step), caption)
    if curves.eval_measure:
        name = curves.measure[:1].upper() + curves.measure[1:]
        chart = curve_chart([("second", curves.eval_measure)], f"{escape(name)} by step", curves.best_step)
        figures += _figure(escape(name), chart, f"Of {curves.eval_rows}.")
    return figures


def _class_figure(measures: LabelMeasures | ItemMeasures) -> str:
    """Precision and recall of each label."""
    count = len(measures.classes)
    shown = "" if count <= MOST_LABELS else f" The {MOST_LABELS} commonest of {count} labels."
    return _figure(
        "Labels",
        class_chart(measures),
        '<span class="key first"></span> precision: share of right answers among those that say it.<br>'
        f'<span class="key second"></span> recall: share of its rows that are found.{shown}',
    )


def _label_figures(labels: LabelMeasures) -> list[str]:
    shown = "" if len(labels.classes) <= MOST_LABELS else f" The {MOST_LABELS} commonest of {len(labels.classes)}."
    figures = [
        _class_figure(labels),
        _figure(
            "What is taken for what",
            confusion_chart(labels),
            f"Rows have the label on the left, answers the one of the number above.{shown}",
        ),
    ]
    if labels.calibration_error is None:
        return figures
    return [
        *figures,
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
    f1 = labels.macro_f1
    return _class_table(
        labels.classes,
        f"Precision, recall and F1 of {len(labels.classes)} labels; macro F1 {f1.value:.3f} ({f1.low:.3f} to "
        f"{f1.high:.3f})",
    )


def _item_table(task: TaskReport) -> str:
    items = task.items
    assert items is not None
    return _class_table(
        items.classes,
        f"Precision {items.precision:.3f}, recall {items.recall:.3f} and micro F1 {items.f1.value:.3f} "
        f"({items.f1.low:.3f} to {items.f1.high:.3f}); macro F1 {items.macro_f1:.3f} of {len(items.classes)} labels",
    )


def _class_table(classes: Sequence[ClassMeasures], summary: str) -> str:
    rows = [(one.label, str(one.rows), f"{one.precision:.3f}", f"{one.recall:.3f}", f"{one.f1:.3f}") for one in classes]
    table = _table(("label", "rows", "precision", "recall", "F1"), rows, numbers=(1, 2, 3, 4))
    return f"<details><summary>{summary}</summary>{table}</details>"


def _number_table(numbers: NumberMeasures) -> str:
    error = numbers.mean_absolute_error
    rows = [
        ("mean absolute error", f"{error.value:.4g} ({error.low:.4g} to {error.high:.4g})"),
        ("root mean squared error", f"{numbers.root_mean_squared_error:.4g}"),
        *(
            (name, "not defined" if value is None else f"{value:.3f}")
            for name, value in (
                ("R2, the share of variance explained", numbers.r2),
                ("Pearson correlation", numbers.pearson),
                ("Spearman correlation of ranks", numbers.spearman),
            )
        ),
    ]
    return _table(("measure", "value"), rows, numbers=(1,))


def _wrong_rows(task: TaskReport) -> str:
    if not task.wrong:
        return "<p>No row is wrong.</p>"
    is_number = task.numbers is not None
    columns = {"line": [str(row.line) for row in task.wrong]}
    if is_number or task.wrong[0].probability is not None:
        columns["error" if is_number else "probability"] = [_sure(row) for row in task.wrong]
    numbers = range(len(columns))
    columns |= {name: [_shorten(getattr(row, name)) for row in task.wrong] for name in ("answer", "expected", "text")}
    rows = list(zip(*columns.values(), strict=True))[:_MOST_ROWS]
    table = _table(list(columns), rows, numbers=numbers, text=len(columns) - 1, cards=True)
    if is_number:
        return f"<details open><summary>The largest errors</summary>{table}</details>"
    order = "" if task.wrong[0].probability is None else ", the most certain first"
    order = f", {_MOST_ROWS} of them here{order}" if len(task.wrong) > _MOST_ROWS else order
    return f"<details open><summary>{len(task.wrong)} wrong rows{order}</summary>{table}</details>"


def _sure(row: WrongRow) -> str:
    if row.error is not None:
        return f"{row.error:+.4g}"
    return "" if row.probability is None else f"{row.probability:.2f}"


def _table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Sequence[int] = (),
    text: int | None = None,
    *,
    cards: bool = False,
) -> str:
    """A table; ``cards`` of one that is a card a row on a phone."""
    kinds = ["number" if place in numbers else "text" if place == text else "" for place in range(len(columns))]
    head = "".join(f'<th class="{kind}">{name}</th>' for kind, name in zip(kinds, columns, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}" data-name="{name}">{escape(cell)}</td>'
            for kind, name, cell in zip(kinds, columns, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    kind = "cards" if cards else "plain"
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _shorten(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"
