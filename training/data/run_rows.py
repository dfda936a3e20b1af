"""The rows of a training run: those to learn from and those to measure on, what is recorded, and what is warned of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from adalink.runtime.errors import DataError
from adalink.runtime.rows.lines import is_standard_input
from adalink.runtime.rows.shards import digest_rows
from adalink.runtime.rows.source import RowSource
from adalink.runtime.storage.head_spec import SINGLE_LABEL
from adalink.training.data.held_out import VALIDATION_SHARE, Lot, Split, describe_split, pick
from adalink.training.data.labelled_rows import LabelledRow, names_of, read_labelled_rows
from adalink.training.data.row_warnings import label_key, prompt_key, warn_of_labels, warn_of_prompts
from adalink.training.data.rows import TrainingRow, read_rows

if TYPE_CHECKING:
    from adalink.training.settings import TrainSettings

R = TypeVar("R")
Progress = Callable[[str], None]
Files = dict[str, dict[str, Any]]


PROMPTS = Lot[TrainingRow](prompt_key, lambda row: row.completion)


def labels_lot(kind: str) -> Lot[LabelledRow]:
    """The lot of rows with labels, by their problem type."""
    return Lot(label_key, lambda row: row.labels if kind == SINGLE_LABEL else (), names_of)


def check_files(data: RowSource, eval_data: RowSource | None) -> None:
    """Refuse standard input, which can be read once only; raises ``DataError``."""
    if is_standard_input(data.path) or (eval_data is not None and is_standard_input(eval_data.path)):
        raise DataError("training rows are read more than once: save standard input as a file, and give its name")


@dataclass(frozen=True)
class RunRows(Generic[R]):
    """The rows of a run.

    Attributes:
        learned: rows to learn from.
        measured: rows to measure on at the end.
        validation: rows by which the run ends early, out of those to learn from; empty where it does not.
        record: the files' part of the report.
    """

    learned: list[R]
    measured: list[R]
    validation: list[R]
    record: Files

    @property
    def training(self) -> list[R]:
        """All rows that play a part in the training."""
        return [*self.learned, *self.validation]


def read_prompts(
    data: RowSource, eval_data: RowSource | None, settings: TrainSettings, progress: Progress
) -> RunRows[TrainingRow]:
    """Rows with prompts.

    Raises:
        DataError: a row has another form, or there are too few.
    """
    rows = read_rows(data)
    eval_rows = None if eval_data is None else read_rows(eval_data)
    parted = _part(data, eval_data, rows, eval_rows, PROMPTS, settings, progress)
    for line in warn_of_prompts(parted.training, parted.measured):
        progress(f"warning: {data.path}: {line}")
    return parted


def read_labelled(
    data: RowSource,
    eval_data: RowSource | None,
    problem_type: str | None,
    settings: TrainSettings,
    progress: Progress,
) -> tuple[str, RunRows[LabelledRow]]:
    """Rows with labels, and their problem type first; raises as ``read_prompts``."""
    kind, rows = read_labelled_rows(data, problem_type)
    eval_rows = None if eval_data is None else read_labelled_rows(eval_data, kind)[1]
    parted = _part(data, eval_data, rows, eval_rows, labels_lot(kind), settings, progress)
    for line in warn_of_labels(parted.training, parted.measured):
        progress(f"warning: {data.path}: {line}")
    return kind, parted


def _part(
    data: RowSource,
    eval_data: RowSource | None,
    rows: list[R],
    eval_rows: list[R] | None,
    lot: Lot[R],
    settings: TrainSettings,
    progress: Progress,
) -> RunRows[R]:
    """Hold rows out of those to learn from: to measure on where there are no others, and to end the run by."""
    splits: dict[str, Split] = {}
    if eval_rows is None:
        splits["split"] = split = lot.draw(rows, settings.seed)
        progress(describe_split(split, [lot.label(row) for row in rows]))
        rows, eval_rows = pick(rows, split.train), pick(rows, split.held_out)
    record = _record(data, eval_data, rows, eval_rows)
    validation: list[R] = []
    if settings.early_stopping is not None:
        splits["validation"] = split = lot.draw(rows, settings.seed, VALIDATION_SHARE)
        rows, validation = pick(rows, split.train), pick(rows, split.held_out)
        progress(f"early stopping: {len(validation)} of the training rows are held out to decide by")
    return RunRows(rows, eval_rows, validation, record | {name: split.as_record() for name, split in splits.items()})


def _record(data: RowSource, eval_data: RowSource | None, rows: Sequence[Any], eval_rows: Sequence[Any]) -> Files:
    files = {}
    for name, source, some in (("train", data, rows), ("eval", eval_data or data, eval_rows)):
        digest = digest_rows(source.path)
        files[name] = {"file": source.path.name, "sha256": digest, "rows": len(some), **source.as_record()}
    return files
