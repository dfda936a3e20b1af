"""Rows for measuring, taken out of the training rows by lot: seeded, and with each label's share."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from adalink.runtime.errors import DataError

T = TypeVar("T")

SHARE = 0.2
# Of the training rows that are left, where evaluations decide when a run ends.
VALIDATION_SHARE = 0.1
# Completions are labels where a distinct one has at least so many rows in the mean.
_FEWEST_ROWS_A_LABEL = 4


@dataclass(frozen=True)
class Split:
    """Which rows are measured on.

    Attributes:
        train: numbers of the training rows, in order, from 0.
        held_out: numbers of the others.
        seed: of the lot.
        stratified: whether every label has its share.
        share: of the rows that are held out.
    """

    train: tuple[int, ...]
    held_out: tuple[int, ...]
    seed: int
    stratified: bool
    share: float = SHARE

    def as_record(self) -> dict[str, Any]:
        """What a report says of it: with the same file, seed and share the rows are the same."""
        numbers = " ".join(map(str, self.held_out)).encode()
        return {
            "seed": self.seed,
            "share": self.share,
            "stratified": self.stratified,
            "row_numbers_sha256": hashlib.sha256(numbers).hexdigest(),
        }


@dataclass(frozen=True)
class Lot(Generic[T]):
    """What a lot looks at in rows of one kind.

    Attributes:
        text: the text of a row.
        label: its label, or what stands for it.
        names: all its labels, where only rows with them can teach them.
    """

    text: Callable[[T], Hashable]
    label: Callable[[T], Hashable]
    names: Callable[[T], Collection[Hashable]] = lambda row: ()

    def draw(self, rows: Sequence[T], seed: int, share: float = SHARE) -> Split:
        """Hold some of these rows out; see ``hold_out``."""
        texts, labels = [self.text(row) for row in rows], [self.label(row) for row in rows]
        return hold_out(texts, labels, seed, share, [self.names(row) for row in rows])


def hold_out(
    texts: Sequence[Hashable],
    labels: Sequence[Hashable],
    seed: int,
    share: float = SHARE,
    names: Sequence[Collection[Hashable]] = (),
) -> Split:
    """Hold some of the rows out.

    Equal texts stay together, so that none is both learned and measured. A label with a single text is not held out.

    Args:
        texts: the text of each row.
        labels: its label, or what stands for it; where they are nearly all different, all rows are one group.
        seed: of the lot.
        share: of the rows to hold out.
        names: all labels of each row; a row stays if no other training row has one of them.

    Raises:
        DataError: there are too few texts, or each has a label of its own.
    """
    rows_of: dict[Hashable, list[int]] = {}
    for number, text in enumerate(texts):
        rows_of.setdefault(text, []).append(number)
    if len(rows_of) < 2:
        raise DataError("all rows have one text, expected at least 2 to hold some out: add rows, or train with --eval")
    stratified = len(labels) >= _FEWEST_ROWS_A_LABEL * len(set(labels)) > _FEWEST_ROWS_A_LABEL
    groups: dict[Hashable, list[list[int]]] = {}
    for numbers in rows_of.values():
        groups.setdefault(labels[numbers[0]] if stratified else None, []).append(numbers)
    rng = np.random.default_rng(seed)
    held_out: list[int] = []
    for _, texts_of_label in sorted(groups.items(), key=lambda item: item[1][0]):
        wanted = share * sum(map(len, texts_of_label))
        for index in rng.permutation(len(texts_of_label))[: len(texts_of_label) - 1]:
            if wanted < 0.5:
                break
            held_out += texts_of_label[index]
            wanted -= len(texts_of_label[index])
    if not held_out:  # every label has a few texts only
        held_out = list(rows_of.values())[int(rng.integers(len(rows_of)))]
    chosen = set(held_out)
    if names:
        _keep_teachers(rows_of.values(), chosen, names)
    train = tuple(number for number in range(len(texts)) if number not in chosen)
    return Split(train, tuple(sorted(chosen)), seed, stratified, share)


def _keep_teachers(texts: Iterable[Sequence[int]], chosen: set[int], names: Sequence[Collection[Hashable]]) -> None:
    """Take rows out of ``chosen``, until the others have all labels; ``texts`` are the rows of each text."""
    known = {name for number, some in enumerate(names) if number not in chosen for name in some}
    for numbers in texts:
        wanted = {name for number in numbers for name in names[number]}
        if numbers[0] in chosen and not wanted <= known:
            chosen.difference_update(numbers)
            known |= wanted
    if not chosen:
        raise DataError(
            "each row has a label that no other has, and none can be held out: add rows, or train with --eval"
        )


def describe_split(split: Split, labels: Sequence[Hashable]) -> str:
    """A line for people: how many rows went where."""
    counts = Counter(labels[number] for number in split.held_out)
    kinds = f", every label's share: {len(counts)} labels" if split.stratified else ""
    return (
        f"no --eval: {len(split.train)} rows to learn from, {len(split.held_out)} held out to measure on (seed "
        f"{split.seed}{kinds})"
    )


def pick(rows: Sequence[T], numbers: Sequence[int]) -> list[T]:
    """The rows of these numbers."""
    return [rows[number] for number in numbers]
