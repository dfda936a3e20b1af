"""The benchmark of drafts: its report by hand, the sides on a tiny deployment, the still task."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runtime import build

from adalink.runtime import Deployment
from benchmarks import drafts
from benchmarks.prepare import make_deployment, make_prompt, write_adapter
from benchmarks.process import REPOSITORY


def rounds(*seconds: list[float], replies: list[list[int]] | None = None) -> list[dict[str, Any]]:
    return [
        {"seconds": one, "replies": replies or [[1, 2], [3]], "versions": {"adalink-kit": "1"}} for one in seconds
    ]  # fmt: skip


def test_report_by_hand() -> None:
    texts = [{"kind": "lists", "text": "a", "tokens": 12}, {"kind": "stories", "text": "b", "tokens": 30}]
    found = {
        "steps": rounds([6.0, 10.0], [3.0, 20.0], [5.0, 30.0]),
        "drafts": rounds([2.0, 20.0], [3.0, 20.0], [1.0, 10.0]),
        "task": rounds([2.0, 5.0], [4.0, 5.0], [1.0, 5.0], replies=[[1, 2], [4]]),
        "genai": rounds([3.0, 5.0], [3.0, 10.0], [3.0, 15.0], replies=[[9, 9], [9]]),
    }
    report = drafts.summarize(texts, found)
    one, other = report["texts"]
    assert one["tokens_per_s"] == {"steps": 12 / 5, "drafts": 12 / 2, "task": 12 / 2, "genai": 12 / 3}
    assert (one["drafts_over_steps"], one["task_over_genai"], one["same_text"]) == (3.0, 1.5, True)
    assert (other["drafts_over_steps"], other["task_over_genai"], other["same_text"]) == (1.0, 2.0, False)
    assert report["drafts_over_steps"] == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert report["by_kind"]["stories"]["task_over_genai"] == {"median": 2.0, "least": 2.0, "most": 2.0}
    json.dumps(report, allow_nan=False)
    # The prompt of make bench is continued past any end, and so no answer: it stands apart.
    texts[1]["kind"] = drafts._BENCH
    apart = drafts.summarize(texts, found)
    assert apart["drafts_over_steps"] == apart["by_kind"]["lists"]["drafts_over_steps"]
    assert apart["drafts_over_steps"] == {"median": 3.0, "least": 3.0, "most": 3.0}
    assert apart["by_kind"][drafts._BENCH]["drafts_over_steps"]["median"] == 1.0


def test_sides_take_turns_the_other_way_round_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def answer(command: list[Any], timeout_s: float, log: Path) -> dict[str, Any]:
        asked.append((str(command[0]), command[command.index("--kind") + 1]))
        return rounds([float(len(asked)), 1.0])[0]

    monkeypatch.setattr(drafts, "run_json", answer)
    found = drafts.measure(tmp_path, {"kit": Path("kit"), "peers": Path("peers")}, 2, "int4", 3)
    once = [(environment, kinds["int4"]) for _, kinds, environment in drafts.SIDES.values()]
    assert asked == [*once, *once[::-1], *once]
    assert [result["seconds"][0] for result in found["steps"]] == [1.0, 8.0, 9.0]


def test_readme_has_the_stored_figures() -> None:
    results = REPOSITORY / "benchmarks" / "results" / "drafts.json"
    text = (REPOSITORY / "benchmarks" / "README.md").read_text()
    lines = drafts.table(json.loads(results.read_text()))
    assert len(lines) == 2 + len(drafts.TEXTS) + 2
    assert "\n".join(lines) in text


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make bench`` leaves, for a tiny base."""
    folder = tmp_path_factory.mktemp("work")
    tiny = build("llama", folder / "tiny")
    make_deployment(tiny.folder, folder / "deployment", [2])
    with Deployment.open(folder / "deployment") as deployment:
        (folder / "prompt.json").write_text(json.dumps(make_prompt(deployment.tokenizer, 12)))
        write_adapter(folder / "still", deployment.manifest.base, 16, 0, is_still=True)
        texts = [{"kind": "k", "text": t, "ids": deployment.tokenizer.encode(t), "tokens": 20} for t in ("abab", "q")]
    (folder / "texts.json").write_text(json.dumps(texts))
    return folder


def test_sides_of_the_kit_write_the_same(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = {side: settings for side, settings in drafts.SIDES.items() if settings[2] == "kit"}
    monkeypatch.setattr(drafts, "SIDES", kit)
    found = drafts.measure(work, {"kit": Path(sys.executable)}, 1, "fp32", 2)
    replies = [result["replies"] for results in found.values() for result in results]
    assert len(replies) == 6
    assert all(reply == replies[0] for reply in replies)
    assert [len(reply) for reply in replies[0]] == [20, 20]
    assert all(seconds > 0 for results in found.values() for result in results for seconds in result["seconds"])


def test_a_still_task_changes_nothing_and_another_does(work: Path, tmp_path: Path) -> None:
    with Deployment.open(work / "deployment") as deployment:
        still = deployment.add_task(work / "still")
        ids = [[7, 8, 9]]
        np.testing.assert_array_equal(deployment.input_embeddings(ids, tasks=still), deployment.input_embeddings(ids))
        assert (deployment.input_embeddings(ids, tasks="task-00000") != deployment.input_embeddings(ids)).any()
