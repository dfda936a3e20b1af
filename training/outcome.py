"""What a finished run says on its eval rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adalink.runtime.storage.head_spec import Head
    from adalink.runtime.text_classifier import Classification
    from adalink.training.data.labelled_rows import LabelledRow
    from adalink.training.data.rows import TrainingRow


@dataclass(frozen=True)
class Reply:
    """A greedy text, and whether it is the expected one and ends there."""

    text: str
    is_right: bool


@dataclass(frozen=True)
class RepliedRows:
    """Answers of a task that gives text, or labels as text, and those of the base without it."""

    rows: Sequence[TrainingRow]
    replies: Sequence[Reply]
    base_replies: Sequence[Reply]
    labels: Sequence[str] | None


@dataclass(frozen=True)
class ClassifiedRows:
    """Answers of a task with a head."""

    rows: Sequence[LabelledRow]
    said: Sequence[Classification]
    head: Head


@dataclass(frozen=True)
class Outcome:
    """A finished run, before its adapter folder is written.

    Attributes:
        name: name of the adapter folder.
        report: the report, as in ``training.json``.
        answers: answers to the eval rows.
    """

    name: str
    report: dict[str, Any]
    answers: RepliedRows | ClassifiedRows
