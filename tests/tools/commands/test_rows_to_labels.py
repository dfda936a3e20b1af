"""From rows to labels with the command line alone: `train`, `export adapter`, `classify`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.tiny_deployments import make_deployment

from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main

COMPLETIONS = {"oil": " energy", "gas": " energy", "corn": " crops", "rye": " crops", "tin": " metals and more"}


def call(*arguments: Any) -> Any:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_labels_of_a_decoder_are_found_in_its_rows(tmp_path: Path) -> None:
    """Completions are few, so they are the labels: they reach the manifest, and nothing else is ever said."""
    model, deployment = make_deployment(tmp_path, "llama", {})
    texts = [{"prompt": f"{word} is", "completion": completion} for word, completion in COMPLETIONS.items()]
    data = write(tmp_path / "rows.jsonl", texts * 4)
    options = ("--rank", 8, "--max-steps", 80, "--lr", 0.02, "--device", "cpu", "--max-length", 32)
    trained = call("train", "--base", model, "--data", data, "--eval", data, "--out", tmp_path / "kinds", *options)
    assert "completions are 3 labels" in trained.stderr
    call("export", "adapter", tmp_path / "kinds", "--out", deployment)
    labels = read_manifest(deployment).tasks["kinds"].labels
    assert labels is not None
    assert set(labels.completions) == set(COMPLETIONS.values())
    asked = write(tmp_path / "asked.jsonl", [{"text": f"{word} is"} for word in [*COMPLETIONS, "something else"]])
    answers = call("classify", deployment, "--jsonl", asked, "--task", "kinds").stdout.splitlines()
    said = [json.loads(line) for line in answers]
    names = {text.strip() for text in COMPLETIONS.values()}
    assert [set(one["probabilities"]) for one in said] == [names] * len(said)
    assert [sum(one["probabilities"].values()) for one in said] == pytest.approx([1] * len(said))
    right = [one["label"] == text.strip() for one, text in zip(said, COMPLETIONS.values(), strict=False)]
    assert sum(right) >= 4


@pytest.mark.slow
def test_spans_on_real_text(tmp_path: Path) -> None:
    """Names in film reviews, with all-MiniLM-L6-v2: what `classify` says is what `train` measured."""
    rows = pytest.importorskip("examples.classifiers.rows")
    demo = pytest.importorskip("examples.classifiers.base")
    parts, base = rows.make_rows("names", 0), demo.find_minilm()
    data, test = (write(tmp_path / f"{split}.jsonl", parts[split]) for split in ("train", "test"))
    options = ("--rank", 16, "--max-steps", 60, "--batch-size", 16, "--lr", 0.01, "--device", "cpu", "--json")
    trained = call("train", "--base", base, "--data", data, "--eval", test, "--out", tmp_path / "names", *options)
    report = json.loads(trained.stdout)
    call("export", "base", base, "--out", tmp_path / "out")
    call("export", "adapter", tmp_path / "names", "--out", tmp_path / "out")
    asked = write(tmp_path / "asked.jsonl", [{"text": row["text"]} for row in parts["test"]])
    answers = call("classify", tmp_path / "out", "--jsonl", asked, "--task", "names").stdout.splitlines()
    hits = found = wanted = 0
    for line, row in zip(answers, parts["test"], strict=True):
        said = json.loads(line)["spans"]
        assert all(row["text"][span["start"] : span["end"]] == span["text"] for span in said)
        received = {(span["start"], span["end"]) for span in said}
        expected = {(span["start"], span["end"]) for span in row["spans"]}
        hits, found, wanted = hits + len(received & expected), found + len(received), wanted + len(expected)
    assert 2 * hits / (found + wanted) == pytest.approx(report["evaluation"]["span_f1"], abs=0.005)
    assert report["evaluation"]["span_f1"] > 0.2  # 0.28 after so few steps; the proof has more
