"""Labelled data sets of a study: three splits that share no text, and seeded subsets of train."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from adalink.runtime.errors import DataError
from adalink.runtime.storage.digest import digest_bytes
from studies.experiment.sources import (
    TWEET_LABELS,
    Sourced,
    book_excerpts,
    by_topic,
    election_tweets,
    film_reviews,
    folder_rows,
    friends_lines,
)

DEFAULT_TEMPLATE = "{text}\nLabel:"
_TEST_SHARE, _VALIDATION_SHARE = 0.25, 0.1


@dataclass(frozen=True)
class Labelled:
    """One row: the first words of a text, and its class as an index in ``DataSet.labels``."""

    text: str
    label: int


@dataclass(frozen=True)
class DataSet:
    """A labelled data set whose splits share no text.

    Attributes:
        name: as in a study file.
        template: how a decoder is asked; ``{text}`` is the row's text.
        labels: text of each class; a decoder answers with a space and it.
        train: rows to learn from.
        validation: rows that choose the learning rate.
        test: rows that results are measured on, and nothing else.
        parts: the data sets that this one is made of; none for one of its own (``studies.experiment.combined``).

    Raises:
        DataError: two splits share a text, or a row has no class.
    """

    name: str
    template: str
    labels: tuple[str, ...]
    train: Sequence[Labelled]
    validation: Sequence[Labelled]
    test: Sequence[Labelled]
    parts: tuple[DataSet, ...] = ()

    def __post_init__(self) -> None:
        texts = {split: {row.text for row in getattr(self, split)} for split in ("train", "validation", "test")}
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            if shared := texts[one] & texts[other]:
                raise DataError(
                    f"data set {self.name}: {len(shared)} texts are in both {one} and {other}, the first "
                    f"{min(shared)[:60]!r}; expected splits that share none: remove them from one"
                )
        for split in texts:
            if not texts[split]:
                raise DataError(f"data set {self.name}: {split} has no row, expected at least one")
            if wrong := [row for row in getattr(self, split) if not 0 <= row.label < len(self.labels)]:
                raise DataError(
                    f"data set {self.name}, {split}: label {wrong[0].label}, expected 0 to {len(self.labels) - 1}"
                )

    def prompt(self, row: Labelled) -> str:
        """What a decoder is given for a row."""
        return self.template.replace("{text}", row.text)

    @cached_property
    def part_of(self) -> tuple[int, ...]:
        """The part that each label belongs to: only labels of one part are told apart."""
        return tuple(index for index, part in enumerate(self.parts or (self,)) for _ in part.labels)

    def subset(self, size: int | None, seed: int) -> list[Labelled]:
        """``size`` rows of train (``None``: all), drawn by ``seed``; a smaller subset lies within a larger one.

        Raises:
            DataError: train has fewer rows.
        """
        rows = list(self.train)
        if size is not None and size > len(rows):
            raise DataError(f"data set {self.name} has {len(rows)} training rows, a study asks for {size}: lower sizes")
        random.Random(f"{self.name};{seed}").shuffle(rows)
        return rows[:size]


@dataclass(frozen=True)
class Source:
    """How a data set is made of its source.

    Attributes:
        kind: what the classes are.
        template: as ``DataSet.template``.
        read: gives the source's texts.
        label_texts: the source's class -> words that say it; classes that are not named keep their names.
    """

    kind: str
    template: str
    read: Callable[[], Iterable[Sourced]]
    label_texts: dict[str, str] = field(default_factory=dict)


R8_LABELS = {"acq": "acquisition", "crude": "oil", "earn": "earnings", "money-fx": "currency", "ship": "shipping"}
_R52_LABELS = {
    "acq": "acquisition", "crude": "oil", "earn": "earnings", "money-fx": "foreign exchange", "ship": "shipping",
    "alum": "aluminium", "bop": "balance of payments", "cpi": "consumer prices", "cpu": "production capacity",
    "dlr": "dollar", "gnp": "national product", "instal-debt": "consumer debt", "interest": "rates",
    "ipi": "industrial production", "iron-steel": "steel", "jobs": "employment", "lei": "leading indicators",
    "meal-feed": "animal feed", "money-supply": "money supply", "nat-gas": "natural gas", "orange": "orange juice",
    "pet-chem": "petrochemicals", "strategic-metal": "strategic metals", "veg-oil": "vegetable oil",
    "wpi": "wholesale prices", "heat": "heating oil", "carcass": "meat", "fuel": "fuel", "gas": "gasoline",
}  # fmt: skip
_NEWSGROUPS = {
    "alt.atheism": "atheism", "comp.graphics": "graphics", "comp.os.ms-windows.misc": "Windows",
    "comp.sys.ibm.pc.hardware": "PC hardware", "comp.sys.mac.hardware": "Mac", "comp.windows.x": "X Window",
    "misc.forsale": "for sale", "rec.autos": "cars", "rec.motorcycles": "motorcycles", "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "hockey", "sci.crypt": "cryptography", "sci.electronics": "electronics",
    "sci.med": "medicine", "sci.space": "space", "soc.religion.christian": "Christianity",
    "talk.politics.guns": "guns", "talk.politics.mideast": "Middle East", "talk.politics.misc": "politics",
    "talk.religion.misc": "religion",
}  # fmt: skip

SOURCES: dict[str, Source] = {
    "reuters-r8": Source("topic", "Text: {text}\nTopic:", lambda: by_topic("reuters-r8"), R8_LABELS),
    "reuters-r52": Source("topic", "Text: {text}\nTopic:", lambda: by_topic("reuters-r52"), _R52_LABELS),
    "20newsgroups": Source("topic", "Text: {text}\nTopic:", lambda: by_topic("20newsgroups"), _NEWSGROUPS),
    "film-reviews": Source(
        "sentiment", "Review: {text}\nThe review is", film_reviews, {"fresh": "positive", "rotten": "negative"}
    ),
    "election-tweets": Source("author", "Tweet: {text}\nAuthor:", election_tweets, TWEET_LABELS),
    "friends": Source("speaker", "Line: {text}\nSpeaker:", friends_lines),
    "book-excerpts": Source(
        "readership", "Text: {text}\nWritten for", book_excerpts, {"adult": "adults", "children": "children"}
    ),
}


def load_data(name: str, words: int, folder: str | None = None, template: str = DEFAULT_TEMPLATE) -> DataSet:
    """A data set of ``SOURCES``, or of one's own in ``folder``, texts cut to their first ``words`` words.

    A split that the source has is kept. Where it has no test split, a quarter of the texts (of the films, for reviews)
    is the test split, and where it has no validation, a tenth of train is; both are drawn by the SHA-256 of the text or
    film, so every machine draws the same. A text that occurs twice once it is cut is kept once, in test before
    validation before train, with the class it has there first. Splits of a folder are taken as they are.

    Args:
        name: name of the data set.
        words: how many words of a text are kept.
        folder: a folder as ``folder_rows`` reads it.
        template: what a decoder is given for a row of the folder.

    Raises:
        DataError: no data set of that name; its package is not installed, the message says what to install; or the
            splits of a folder share a text.
    """
    if folder is None and name not in SOURCES:
        raise DataError(f"data set {name!r} is unknown, expected one of {', '.join(SOURCES)}")
    return _load(name, words) if folder is None else _load_own(name, words, Path(folder), template)


@lru_cache(maxsize=16)
def _load(name: str, words: int) -> DataSet:
    source = SOURCES[name]
    sourced = list(source.read())
    classes = sorted({row.label for row in sourced})
    splits: dict[str, dict[str, int]] = {"test": {}, "validation": {}, "train": {}}
    for row in sourced:
        if text := _cut(row.text, words):
            splits[_split(row, text)].setdefault(text, classes.index(row.label))
    seen: set[str] = set()
    kept: dict[str, tuple[Labelled, ...]] = {}
    for split, rows in splits.items():
        # In the order of their digests: the first rows of a split are a fair sample of it.
        chosen = sorted((text for text in rows if text not in seen), key=_digest)
        kept[split] = tuple(Labelled(text, rows[text]) for text in chosen)
        seen |= rows.keys()
    labels = tuple(source.label_texts.get(label, label) for label in classes)
    return DataSet(name, source.template, labels, kept["train"], kept["validation"], kept["test"])


def _load_own(name: str, words: int, folder: Path, template: str) -> DataSet:
    sourced = list(folder_rows(folder))
    classes = sorted({row.label for row in sourced})
    splits: dict[str, list[Labelled]] = {"train": [], "validation": [], "test": []}
    for row in sourced:
        splits[row.split].append(Labelled(_cut(row.text, words), classes.index(row.label)))
    return DataSet(name, template, tuple(classes), splits["train"], splits["validation"], splits["test"])


def _cut(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def digest_rows(data: DataSet, rows: Sequence[Labelled]) -> str:
    """Digest of rows as a run uses them: prompts, labels, and their order."""
    lines = [json.dumps([data.prompt(row), row.text, data.labels[row.label]]) for row in rows]
    return digest_bytes("\n".join([json.dumps(data.labels), *lines]).encode())


def _split(row: Sourced, text: str) -> str:
    place = int.from_bytes(_digest(row.group or text)[:8], "big") / (1 << 64)
    if row.split == "test" or (not row.split and place < _TEST_SHARE):
        return "test"
    if not row.split:
        place = (place - _TEST_SHARE) / (1 - _TEST_SHARE)
    return "validation" if place < _VALIDATION_SHARE else "train"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
