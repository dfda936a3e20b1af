"""Speculative decoding of a single prompt by prompt lookup, beside onnxruntime-genai.

    python -m benchmarks.drafts --peers-python build/peers/bin/python    # 12 minutes on two cores

It uses the models that ``make bench`` makes in build/bench. Every side generates as many tokens for a text as the
float32 base model does: ``steps`` token by token, ``drafts`` speculatively, ``task`` speculatively with a task active,
and ``genai`` is onnxruntime-genai. Their processes take turns. The task's weights change nothing, so that all sides
write the same text; its arithmetic is that of any other task. Draft tokens come from the text itself, so the gain
depends on the texts: they are in ``TEXTS``, by kind.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from adalink.runtime import Deployment
from adalink.runtime.generation.speculative_decoding import DRAFT_TOKENS
from adalink.runtime.sampling.sampler import PLAIN_GREEDY
from adalink.tools.common.environment import available_cores, describe_environment
from adalink.tools.common.report_file import write_json
from benchmarks.prepare import write_adapter
from benchmarks.process import run_json
from benchmarks.scale import TASK_RANK

_ARTICLE = (
    "The city council met on Tuesday to discuss the new bridge over the river. Mayor Ellen Brooks said the bridge will "
    "cost 40 million dollars and take three years to build. Several residents objected to the noise of the "
    "construction, while shop owners hoped for more visitors. The council will vote on the plan in March."
)
TEXTS = {
    "questions and stories": (
        "Write a short story about a dog who finds a lost key.",
        "Tell me about the history of the Roman Empire.",
        "Explain how photosynthesis works in simple terms.",
        "What are the benefits of regular exercise?",
        "Describe a sunset over the ocean in three sentences.",
        "Write an email to my boss asking for a day off.",
        "Compare cats and dogs as pets.",
        "What is machine learning?",
    ),
    "lists and code": (
        "List ten facts about the planet Mars.",
        "Write a Python function that returns the n-th Fibonacci number.",
        "Give me a recipe for tomato soup.",
        "Make a table of the planets with their sizes.",
        "Write a JSON object with the name, age and city of five people.",
        "Write unit tests for a stack class in Python.",
    ),
    "about a text": tuple(
        f"{task}: {_ARTICLE}"
        for task in (
            "Summarize this text",
            "Rewrite this text more politely",
            "List the names and numbers in this text",
            "Correct the spelling of this text and print it again",
            "Continue this text",
        )
    ),
}
_BENCH = "the prompt of make bench"
_COLUMNS = {"drafts over steps": "drafts_over_steps", "drafts with a task over genai": "task_over_genai"}
_MOST_TOKENS, _FEWEST_TOKENS = 256, 16
_TIMEOUT_S = 900
# Side -> script, its kind for each precision, and whose Python runs it.
SIDES = {
    "steps": ("adalink_kit", {"fp32": "base", "int4": "int4-base"}, "kit"),
    "drafts": ("adalink_kit", {"fp32": "base-drafts", "int4": "int4-base-drafts"}, "kit"),
    "task": ("adalink_kit", {"fp32": "still-drafts", "int4": "int4-still-drafts"}, "kit"),
    "genai": ("genai", {"fp32": "fp32", "int4": "int4"}, "peers"),
}


def write_texts(deployment: Deployment, path: Path) -> list[dict[str, Any]]:
    """Each text as tokens of a chat, with the length of the base's answer; answers of a few words are left out.

    Then the prompt of ``make bench``, which is continued past any end.
    """
    chosen = []
    for kind, texts in TEXTS.items():
        for text in texts:
            ids = deployment.tokenizer.encode_chat(text)
            (answer,) = deployment.generate([ids], max_new_tokens=_MOST_TOKENS, sampling=PLAIN_GREEDY)
            if len(answer.token_ids) >= _FEWEST_TOKENS:
                chosen.append({"kind": kind, "text": text, "ids": ids, "tokens": len(answer.token_ids)})
    bench_prompt = json.loads(path.with_name("prompt.json").read_text(encoding="utf-8"))
    chosen.append({"kind": _BENCH, "text": bench_prompt["text"], "ids": bench_prompt["ids"], "tokens": _MOST_TOKENS})
    path.write_text(json.dumps(chosen), encoding="utf-8")
    return chosen


def measure(work: Path, pythons: dict[str, Path], threads: int, precision: str, rounds: int) -> dict[str, list[Any]]:
    """Each side's results of all rounds; the order of the sides alternates."""
    results: dict[str, list[Any]] = {side: [] for side in SIDES}
    for turn in range(rounds):
        for side in list(SIDES)[:: 1 if turn % 2 == 0 else -1]:
            script, kinds, environment = SIDES[side]
            command: list[str | Path] = [pythons[environment], "-m", f"benchmarks.peers.{script}", "--work", work]
            command += ["--kind", kinds[precision], "--prompt", work / "prompt.json", "--threads", str(threads)]
            command += ["--texts", work / "texts.json"]
            results[side].append(run_json(command, _TIMEOUT_S, work / "logs" / f"drafts.{precision}.{side}.{turn}.log"))
            seconds = sum(results[side][-1]["seconds"])
            print(f"{precision}, round {turn + 1} of {rounds}, {side}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return results


def summarize(texts: list[dict[str, Any]], results: dict[str, list[Any]]) -> dict[str, Any]:
    """For each text the medians of tokens/s and of each round's ratio; then the ratios' medians over the texts."""
    rows = []
    for place, text in enumerate(texts):
        seconds = {side: [result["seconds"][place] for result in rounds] for side, rounds in results.items()}
        rows.append({
            "kind": text["kind"],
            "text": text["text"],
            "tokens": text["tokens"],
            "tokens_per_s": {side: text["tokens"] / statistics.median(values) for side, values in seconds.items()},
            "drafts_over_steps": _ratio(seconds["steps"], seconds["drafts"]),
            "task_over_genai": _ratio(seconds["genai"], seconds["task"]),
            "same_text": all(
                result["replies"][place] == results["steps"][0]["replies"][place]
                for side in ("drafts", "task")
                for result in results[side]
            ),
        })  # fmt: skip
    return {
        "texts": rows,
        **{name: _spread([row[name] for row in rows if row["kind"] != _BENCH]) for name in _COLUMNS.values()},
        "by_kind": {
            kind: {name: _spread([row[name] for row in rows if row["kind"] == kind]) for name in _COLUMNS.values()}
            for kind in dict.fromkeys(row["kind"] for row in rows)
        },
        "versions": {side: rounds[0]["versions"] for side, rounds in results.items()},
    }


def table(report: dict[str, Any]) -> list[str]:
    """The table of a report, as lines of benchmarks/README.md."""
    lines = [
        "| texts | " + " | ".join(f"{name}, {precision}" for precision in ("fp32", "int4") for name in _COLUMNS) + " |"
    ]
    lines.append("| --- |" + " --- |" * 4)
    for kind in (*TEXTS, None, _BENCH):
        cells = []
        for precision in ("fp32", "int4"):
            summary = report[precision] if kind is None else report[precision]["by_kind"][kind]
            for name in _COLUMNS.values():
                spread = summary[name]
                several = "" if kind == _BENCH else f" ({spread['least']:.2f} to {spread['most']:.2f})"
                cells.append(f"{spread['median']:.2f}{several}")
        lines.append(f"| {kind or 'all of these'} | " + " | ".join(cells) + " |")
    return lines


def _ratio(slower: list[float], faster: list[float]) -> float:
    """Speed-up: the median of the rounds' ratios."""
    return statistics.median(one / other for one, other in zip(slower, faster, strict=True))


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> None:
    """Measure, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="made by make bench")
    parser.add_argument("--peers-python", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/drafts.json"))
    arguments = parser.parse_args()
    work: Path = arguments.work
    with Deployment.open(work / "base") as deployment:
        texts = write_texts(deployment, work / "texts.json")
        shutil.rmtree(work / "still", ignore_errors=True)
        write_adapter(work / "still", deployment.manifest.base, TASK_RANK, 0, is_still=True)
    pythons = {"kit": Path(sys.executable), "peers": arguments.peers_python}
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": "python -m benchmarks.drafts --peers-python build/peers/bin/python",
        "environment": describe_environment(),
        "settings": {"threads": arguments.threads, "rounds": arguments.rounds, "draft_tokens": DRAFT_TOKENS,
                     "task_rank": TASK_RANK},
        **{
            precision: summarize(texts, measure(work, pythons, arguments.threads, precision, arguments.rounds))
            for precision in ("fp32", "int4")
        },
    }  # fmt: skip
    write_json(arguments.out, report, option="--out")
    print("\n".join(table(report)))


if __name__ == "__main__":
    main()
