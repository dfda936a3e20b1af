"""The rows of a training run: those to learn from and those to measure on, what is recorded, and what is warned of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from adalink.runtime.errors import DataError
from adalink.runtime.rows.lines import STANDARD_INPUT
from adalink.runtime.rows.source import RowSource
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.head_spec import SINGLE_LABEL
from adalink.training.data.held_out import Split, describe_split, hold_out, pick
from adalink.training.data.labelled_rows import LabelledRow, read_labelled_rows
from adalink.training.data.row_warnings import label_key, prompt_key, warn_of_labels, warn_of_prompts
from adalink.training.data.rows import TrainingRow, read_rows

Progress = Callable[[str], None]
Files = dict[str, dict[str, Any]]


def check_files(data: RowSource, eval_data: RowSource | None) -> None:
    """Refuse standard input, which can be read once only; raises ``DataError``."""
    if STANDARD_INPUT in (data.path, eval_data and eval_data.path):
        raise DataError("training rows are read more than once: save standard input as a file, and give its name")


def read_prompts(
    data: RowSource, eval_data: RowSource | None, seed: int, progress: Progress
) -> tuple[list[TrainingRow], list[TrainingRow], Files]:
    """Rows with prompts to learn from and to measure on, and the files' part of the report.

    Raises:
        DataError: a row has another form, or there are too few.
    """
    rows, split = read_rows(data), None
    if eval_data is not None:
        eval_rows = read_rows(eval_data)
    else:
        labels = [row.completion for row in rows]
        split = hold_out([prompt_key(row) for row in rows], labels, seed)
        progress(describe_split(split, labels))
        rows, eval_rows = pick(rows, split.train), pick(rows, split.held_out)
    for line in warn_of_prompts(rows, eval_rows):
        progress(f"warning: {data.path}: {line}")
    return rows, eval_rows, _record(data, eval_data, rows, eval_rows, split)


def read_labelled(
    data: RowSource, eval_data: RowSource | None, problem_type: str | None, seed: int, progress: Progress
) -> tuple[str, list[LabelledRow], list[LabelledRow], Files]:
    """The same for rows with labels, and their problem type first."""
    kind, rows = read_labelled_rows(data, problem_type)
    split = None
    if eval_data is not None:
        eval_rows = read_labelled_rows(eval_data, kind)[1]
    else:
        labels = [row.labels if kind == SINGLE_LABEL else () for row in rows]
        split = hold_out([label_key(row) for row in rows], labels, seed)
        progress(describe_split(split, labels))
        rows, eval_rows = pick(rows, split.train), pick(rows, split.held_out)
    for line in warn_of_labels(rows, eval_rows):
        progress(f"warning: {data.path}: {line}")
    return kind, rows, eval_rows, _record(data, eval_data, rows, eval_rows, split)


def _record(
    data: RowSource, eval_data: RowSource | None, rows: Sequence[Any], eval_rows: Sequence[Any], split: Split | None
) -> Files:
    files = {}
    for name, source, some in (("train", data, rows), ("eval", eval_data or data, eval_rows)):
        digest = digest_file(source.path)
        files[name] = {"file": source.path.name, "sha256": digest, "rows": len(some), **source.as_record()}
    return files if split is None else {**files, "split": split.as_record()}
