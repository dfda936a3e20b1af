"""What a deployment answers to rows with labels, and how much of it is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from examples.classifiers.rows import Row

if TYPE_CHECKING:
    from adalink.runtime import Deployment
    from adalink.runtime.text_classifier import Classification

Answers = set[Any]


def said_answers(said: Classification) -> Answers:
    """The label, the labels, or the spans."""
    if said.label is not None:
        return {said.label}
    return set(said.labels) or {(span.start, span.end, span.label) for span in said.spans}


def right_answers(row: Row) -> Answers:
    """Likewise, as the row has them."""
    if "label" in row:
        return {row["label"]}
    if "labels" in row:
        return set(row["labels"])
    return {(span["start"], span["end"], span["label"]) for span in row["spans"]}


def f1(received: Sequence[Answers], expected: Sequence[Answers]) -> float:
    """F1 over all answers together; of rows with one label each this is the accuracy."""
    hits = sum(len(ours & theirs) for ours, theirs in zip(received, expected, strict=True))
    total = sum(map(len, received)) + sum(map(len, expected))
    return 2 * hits / total if total else 1.0


def deployed_f1(deployment: Deployment, tasks: dict[str, list[Row]]) -> dict[str, float]:
    """F1 of each task on its rows, classified in batches of mixed tasks."""
    mixed = [(task, row) for rows in zip(*tasks.values(), strict=True) for task, row in zip(tasks, rows, strict=True)]
    said = deployment.classify([row["text"] for _, row in mixed], [task for task, _ in mixed])
    return {
        name: f1(
            [said_answers(one) for one, (task, _) in zip(said, mixed, strict=True) if task == name],
            [right_answers(row) for task, row in mixed if task == name],
        )
        for name in tasks
    }
