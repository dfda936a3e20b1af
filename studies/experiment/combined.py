"""Several data sets as one: one method learns all of them, and is measured on each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from studies.experiment.data import DataSet, Labelled


@dataclass(frozen=True)
class CombinedDataSet(DataSet):
    """A data set whose rows keep the wording and the labels of the data set that they come from.

    Its labels are those of the parts, one after another; a row's ``label`` counts from the first part's first label.
    The rows of validation and test are those of the parts in turn.
    """

    def prompt(self, row: Labelled) -> str:
        """What a decoder is given for a row: as its own data set words it."""
        return self.parts[self.part_of[row.label]].prompt(row)

    def subset(self, size: int | None, seed: int) -> list[Labelled]:
        """The subsets of the parts, shuffled; those of shorter ones are repeated, so that all are seen as often.

        Raises:
            DataError: a part has fewer rows.
        """
        drawn = [
            [_moved(row, start) for row in part.subset(size, seed)]
            for part, start in zip(self.parts, _starts(self.parts), strict=True)
        ]
        longest = max(map(len, drawn))
        rows = [row for part in drawn for row in itertools.islice(itertools.cycle(part), longest)]
        random.Random(f"{self.name};{seed}").shuffle(rows)
        return rows


def combine(name: str, parts: Sequence[DataSet]) -> CombinedDataSet:
    """Make one data set of several.

    Args:
        name: what it is called.
        parts: at least two data sets.

    Raises:
        DataError: a text is in train of one and in test of another, or the like.
    """
    starts = _starts(parts)
    splits = {
        split: _in_turn(
            [[_moved(row, start) for row in getattr(part, split)] for part, start in zip(parts, starts, strict=True)]
        )
        for split in ("train", "validation", "test")
    }
    return CombinedDataSet(
        name, "{text}", tuple(label for part in parts for label in part.labels), **splits, parts=tuple(parts)
    )


def _starts(parts: Sequence[DataSet]) -> list[int]:
    """The number of each part's first label."""
    return list(itertools.accumulate((len(part.labels) for part in parts[:-1]), initial=0))


def _moved(row: Labelled, start: int) -> Labelled:
    return Labelled(row.text, row.label + start)


def _in_turn(groups: Sequence[Sequence[Labelled]]) -> tuple[Labelled, ...]:
    return tuple(row for rows in itertools.zip_longest(*groups) for row in rows if row is not None)
