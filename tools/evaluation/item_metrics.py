"""Measures of answers that are several things at once: labels of a text, or spans in it. Only exact ones count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from adalink.tools.evaluation.metrics import RESAMPLES, SEED
from adalink.tools.evaluation.report import ClassMeasures, Estimate, ItemMeasures
from adalink.tools.evaluation.rows import Item

Counts = npt.NDArray[np.int64]


def measure_items(expected: Sequence[frozenset[Item]], given: Sequence[frozenset[Item]]) -> ItemMeasures:
    """Precision, recall and F1 over all items together, and of each label.

    As CoNLL's script and seqeval count entities: a span is right if its label and both ends are.

    Args:
        expected: the right items of each row.
        given: those of the answer.
    """
    right = [one & other for one, other in zip(expected, given, strict=True)]
    wanted, said, found = (
        Counter(_label(item) for items in rows for item in items) for rows in (expected, given, right)
    )
    names = sorted(wanted.keys() | said.keys(), key=lambda name: (-wanted[name], name))
    classes = [
        ClassMeasures(
            label=name,
            rows=wanted[name],
            answers=said[name],
            precision=_ratio(found[name], said[name]),
            recall=_ratio(found[name], wanted[name]),
            f1=_f1(found[name], wanted[name], said[name]),
        )
        for name in names
    ]
    counts = np.array([[len(items) for items in rows] for rows in (right, expected, given)])
    total = counts.sum(axis=1).tolist()
    return ItemMeasures(
        f1=_bootstrap(counts, _f1(*total)),
        precision=_ratio(total[0], total[2]),
        recall=_ratio(total[0], total[1]),
        macro_f1=float(np.mean([one.f1 for one in classes])) if classes else 1.0,
        right=total[0],
        expected=total[1],
        given=total[2],
        classes=classes,
    )


def _label(item: Item) -> str:
    return item if isinstance(item, str) else item[2]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _f1(right: int, expected: int, given: int) -> float:
    """F1; 1 where there is nothing to find and nothing is found."""
    return 2 * right / (expected + given) if expected + given else 1.0


def _bootstrap(counts: Counts, value: float) -> Estimate:
    """F1 with a seeded bootstrap interval: rows are drawn anew. Counts are of right, expected and given items a row."""
    rng, rows = np.random.default_rng(SEED), counts.shape[1]
    drawn = [counts[:, rng.integers(0, rows, rows)].sum(axis=1).tolist() for _ in range(RESAMPLES)]
    low, high = np.quantile([_f1(*total) for total in drawn], [0.025, 0.975])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))
