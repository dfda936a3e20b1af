"""A file of rows divided into two: rows to learn from, and rows to test with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from adalink.runtime.rows.source import RowSource
from adalink.runtime.rows.table import ANSWERED_ROW, read_table
from adalink.runtime.storage.atomic import make_folder, replace_file
from adalink.runtime.storage.head_spec import REGRESSION
from adalink.training.data.held_out import Split
from adalink.training.data.labelled_rows import has_labels, read_labelled_rows
from adalink.training.data.rows import read_rows
from adalink.training.data.run_rows import PROMPTS, check_files, labels_lot

TRAIN_FILE, TEST_FILE = "train.jsonl", "test.jsonl"


class SplitFiles(NamedTuple):
    """The two files, and what the lot was."""

    train: Path
    test: Path
    split: Split


def split_rows(source: RowSource, out: Path, seed: int = 0) -> SplitFiles:
    """Hold a fifth of the rows out, as ``train`` without eval rows does, and write both parts as JSONL.

    Columns have the kit's names and prompts are made by the template, so other verbs read the files as they are. Paths
    of images lead from the new folder to the same files.

    Args:
        source: the rows.
        out: folder of ``train.jsonl`` and ``test.jsonl``, which are replaced.
        seed: of the lot.

    Raises:
        DataError: a row has another form, or there are too few.
        WriteError: the folder cannot be written.
    """
    check_files(source, None)
    numbers: dict[int, float] = {}
    if source.template is None and has_labels(source):
        kind, rows = read_labelled_rows(source)
        split = labels_lot(kind).draw(rows, seed)
        if kind == REGRESSION:  # in CSV a number is text
            numbers = {place: row.value for place, row in enumerate(rows)}
    else:
        split = PROMPTS.draw(read_rows(source), seed)
    held_out = set(split.held_out)
    parts: tuple[list[bytes], list[bytes]] = [], []
    for place, row in enumerate(read_table(source, ANSWERED_ROW)):
        fields = row.fields | ({"label": numbers[place]} if place in numbers else {})
        parts[place in held_out].append(msgspec.json.encode(_moved(fields, source.path.parent, out)) + b"\n")
    make_folder(out, repair="choose a writable --out")
    (out / TEST_FILE).unlink(missing_ok=True)  # after a crash no old test rows lie beside new training rows
    for name, lines in zip((TRAIN_FILE, TEST_FILE), parts, strict=True):
        replace_file(out / name, b"".join(lines), repair="choose a writable --out")
    return SplitFiles(out / TRAIN_FILE, out / TEST_FILE, split)


def _moved(fields: dict[str, Any], before: Path, after: Path) -> dict[str, Any]:
    """A row whose images are named from another folder."""
    images = fields.get("images")
    if not isinstance(images, list):
        return fields
    return fields | {"images": [os.path.relpath(before / str(image), after) for image in images]}
