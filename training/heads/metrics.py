"""How well a head does on rows with labels: accuracy, F1 and errors, beside the simplest answer there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Head
from adalink.runtime.text_classifier import Classification
from adalink.training.data.labelled_rows import LabelledRow

Found: TypeAlias = "Sequence[set[Any]]"


def measure(head: Head, rows: Sequence[LabelledRow], said: Sequence[Classification]) -> dict[str, float]:
    """Metrics by name, the one to look at first; the answers that need no text are the best for these very rows.

    Args:
        head: the head.
        rows: rows with labels.
        said: what the head says of each row.
    """
    if head.problem_type == REGRESSION:
        numbers = [0.0 if one.value is None else one.value for one in said]
        return _measure_numbers(numbers, [row.value for row in rows])
    if head.problem_type == SINGLE_LABEL:
        wanted = [{row.labels[0]} for row in rows]
        found = [{one.label} for one in said]
        return {
            "accuracy": _share([one == other for one, other in zip(found, wanted, strict=True)]),
            "macro_f1": _macro_f1(found, wanted),
            "majority_accuracy": max(Counter(row.labels[0] for row in rows).values()) / len(rows),
        }
    if head.problem_type == MULTI_LABEL:
        wanted, several = [set(row.labels) for row in rows], [set(one.labels) for one in said]
        exact = _share([one == other for one, other in zip(several, wanted, strict=True)])
        return {"micro_f1": _f1(several, wanted), "macro_f1": _macro_f1(several, wanted), "exact_match": exact}
    spans: list[set[Any]] = [{(span.start, span.end, span.label) for span in row.spans} for row in rows]
    read: list[set[Any]] = [{(span.start, span.end, span.label) for span in one.spans} for one in said]
    return {"span_f1": _f1(read, spans), "span_macro_f1": _macro_f1(read, spans, kind=lambda span: span[2])}


def _measure_numbers(found: Sequence[float], wanted: Sequence[float]) -> dict[str, float]:
    ours, theirs = np.array(found), np.array(wanted)
    spread = ours.std() * theirs.std()
    correlation = float(((ours - ours.mean()) * (theirs - theirs.mean())).mean() / spread) if spread else 0.0
    return {
        "mean_squared_error": float(((ours - theirs) ** 2).mean()),
        "mean_absolute_error": float(np.abs(ours - theirs).mean()),
        "pearson": correlation,
        "mean_squared_error_of_the_mean": float(theirs.var()),
    }


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values))


def _f1(found: Found, wanted: Found) -> float:
    """F1 over all answers together; 1 where there is nothing to find and nothing is found."""
    right = sum(len(one & other) for one, other in zip(found, wanted, strict=True))
    total = sum(map(len, found)) + sum(map(len, wanted))
    return 2 * right / total if total else 1.0


def _macro_f1(found: Found, wanted: Found, kind: Any = lambda label: label) -> float:
    """Mean F1 of the kinds of answers."""
    kinds = sorted({kind(one) for answers in (*found, *wanted) for one in answers})
    if not kinds:
        return 1.0
    return float(
        np.mean(
            [
                _f1(*([{one for one in answers if kind(one) == name} for answers in side] for side in (found, wanted)))
                for name in kinds
            ]
        )
    )
