"""An evaluation of a deployment: every task on every variant, against a reference, on one file of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from adalink.runtime.errors import DataError, RequestError
from adalink.runtime.rows.lines import is_standard_input
from adalink.runtime.rows.shards import digest_rows
from adalink.runtime.rows.source import RowSource
from adalink.runtime.rows.table import ANSWERED_ROW, read_table
from adalink.runtime.storage.head_spec import REGRESSION
from adalink.runtime.storage.known_tasks import check_tasks
from adalink.tools.evaluation.answers import Answers, Progress, check_labels, classify_rows, generate_rows, kind_of
from adalink.tools.evaluation.compare import against_base, against_constant
from adalink.tools.evaluation.report import Report, TaskReport
from adalink.tools.evaluation.rows import TEXT, EvalRow, read_eval_rows
from adalink.tools.evaluation.task_report import make_task_report
from adalink.tools.evaluation.verdict import sum_up

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment
    from adalink.runtime.storage.manifest import Manifest

MAJORITY, BASE = "majority", "base"


@dataclass(frozen=True)
class TaskRows:
    """What a task gives, as in ``TaskReport``, and the rows that it is asked."""

    kind: str
    rows: list[EvalRow]


def read_task_rows(manifest: Manifest, tasks: Sequence[str], source: RowSource) -> dict[str, TaskRows]:
    """The rows of each task, checked before an engine is opened; a file is read once for each kind.

    A row with a column ``task`` is for that task alone, as in ``adalink run``.

    Args:
        manifest: of the deployment.
        tasks: tasks that it has.
        source: the file.

    Raises:
        RequestError: a task has no head, or a row names one that is not deployed.
        DataError: the file is standard input, or a row has another form, or a label that the task never gives, or no
            row is for a task.
    """
    if is_standard_input(source.path):
        raise DataError("rows are read once for each task: save standard input as a file, and give its name")
    named = _tasks_of(manifest, source)
    read: dict[str, list[EvalRow]] = {}
    found = {}
    for task in tasks:
        kind, labels = kind_of(manifest.base, manifest.tasks[task], task)
        known = read[kind] if kind in read else read.setdefault(kind, read_eval_rows(source, kind))
        if not (rows := [row for row in known if named.get(row.line) in (None, task)]):
            raise DataError(f"{source.path}: every row names another task than {task!r}: leave --task {task} out")
        if any(row.images for row in rows):  # labels are scored behind texts alone
            kind = TEXT
        if kind not in (TEXT, REGRESSION):
            check_labels(rows, kind, labels, task, source.path)
        found[task] = TaskRows(kind, rows)
    return found


def _tasks_of(manifest: Manifest, source: RowSource) -> dict[int, str | None]:
    """The task of each row, by its line; raises ``UnknownTaskError`` or ``DataError``."""
    tasks = {}
    for row in read_table(source, ANSWERED_ROW):
        task = row.fields.get("task")
        if not isinstance(task, str | None):
            raise DataError(f"{row.origin}: task is {task!r:.80}, expected a name or null")
        check_tasks([task], manifest.tasks, row.origin)
        tasks[row.line] = task
    return tasks


def evaluate_task(
    deployment: Deployment,
    task: str,
    variant: str,
    asked: TaskRows,
    progress: Progress,
    *,
    against: str | None = None,
    calibration: str | None = None,
) -> TaskReport:
    """Evaluate one task of an open deployment.

    Args:
        deployment: the deployment.
        task: the task.
        variant: name of the variant that is open, for the report.
        asked: its rows.
        progress: called as ``progress_bar`` says.
        against: ``"base"`` or ``"majority"``; by default the commonest answer, for labels and numbers.
        calibration: see ``Deployment.classify``.

    Raises:
        RequestError: the task cannot be evaluated, or compared so.
    """
    kind, rows = asked.kind, asked.rows
    settings = deployment.manifest.tasks[task]
    if against == BASE and settings.head is not None:
        raise RequestError(f"the base has no head, as task {task!r} has: compare with --against majority")
    if kind == TEXT and (against == MAJORITY or calibration is not None):
        raise RequestError(f"task {task!r} gives text: --against majority and --calibrate are for labels")

    def answer(name: str | None, labels: Sequence[str] | None = None) -> Answers:
        if kind == TEXT:
            return generate_rows(deployment, rows, name, progress)
        return classify_rows(deployment, rows, name, progress, labels=labels, calibration=calibration)

    answers = answer(task)
    if against != BASE:
        return make_task_report(task, variant, kind, rows, answers, against_constant(kind, rows, answers))
    labels = None if settings.labels is None else settings.labels.completions
    reference = against_base(answers, answer(None, labels))
    return make_task_report(task, variant, kind, rows, answers, reference)


def make_report(base: str, data: Path, tasks: Sequence[TaskReport]) -> Report:
    """The report on all tasks and variants of a base, by its name."""
    return Report(
        verdict=sum_up(tasks),
        base=base,
        data=data.name,
        data_sha256=digest_rows(data),
        kit_version=version("adalink-kit"),
        tasks=list(tasks),
    )
