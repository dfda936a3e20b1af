"""Measure the example tasks as they are deployed: exact match on test rows, for any variant of the base.

    python examples/make_data.py --out build/examples
    python examples/accuracy.py DEPLOYMENT --data build/examples --variant int4 --out build/examples/int4.json

A reply counts when it is the label and nothing else, as in ``evaluate.py``, which measures the same in PyTorch.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from adalink.runtime.deployment import Deployment
from adalink.training.dataset import Row, read_rows

TASKS = ("reuters-r8", "tweet-author")
BATCH_ROWS = 16
SEED = 0


def accuracy(deployment: Deployment, task: str, rows: list[Row]) -> float:
    """Share of ``rows`` that the task answers with the wanted completion and then an end token."""
    encode = deployment.tokenizer.encode
    longest = max(len(encode(row.completion)) for row in rows) + 1
    by_length = sorted(rows, key=lambda row: len(encode(row.prompt)))
    right = 0
    for start in range(0, len(by_length), BATCH_ROWS):
        batch = by_length[start : start + BATCH_ROWS]
        replies = deployment.generate([row.prompt for row in batch], tasks=task, max_new_tokens=longest)
        right += sum(
            reply.finish_reason == "stop" and reply.text.strip() == row.completion.strip()
            for reply, row in zip(replies, batch, strict=True)
        )
        print(f"\r{task}: {start + len(batch)} of {len(rows)} rows", end="", flush=True)
    print()
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("deployment", type=Path, help="a deployment with both example tasks")
    parser.add_argument("--variant", help="which form of the base; not a quantised one by default")
    parser.add_argument("--data", type=Path, default=Path("build/examples"), help="folder that make_data.py wrote")
    parser.add_argument("--rows", type=int, default=0, help="test rows of each task, drawn with a seed; 0 for all")
    parser.add_argument("--threads", type=int, help="threads of the engine")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    options = parser.parse_args()
    begin = time.perf_counter()
    tasks = {}
    with Deployment.open(options.deployment, variant=options.variant, threads=options.threads) as deployment:
        for task in TASKS:
            rows = read_rows(options.data / task / "test.jsonl")
            if 0 < options.rows < len(rows):
                rows = random.Random(SEED).sample(rows, options.rows)
            tasks[task] = {"rows": len(rows), "exact_match": accuracy(deployment, task, rows)}
            print(json.dumps({task: tasks[task]}), flush=True)
        figures = {
            "base": deployment.manifest.base.name,
            "variant": options.variant,
            "tasks": tasks,
            "wall_seconds": round(time.perf_counter() - begin, 1),
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
