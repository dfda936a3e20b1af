"""Bad rows of `adalink run --jsonl`, and pairs of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers.host_device import HostBackend
from helpers.tiny_deployments import make_deployment
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_pair_tokenizer, make_tokenizer

from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from adalink.runtime.options import OpenOptions
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main
from adalink.tools.rows import answers
from adalink.tools.rows.rows import BadRows, PromptRow

TEXTS = ("Is it late?", "yes, 9-30.")
# A line of a file, and what is said of it.
BAD_LINES = {
    "{": "not JSON",
    "[]": "expected {",
    '{"prompt": "x", "task": 3}': "task is 3",
    '{"prompt": "x", "task": "gamma"}': "task 'gamma' is not deployed here",
    '{"prompt": ""}': "the prompt has no tokens",
    json.dumps({"prompt": "a" * 100}): "the sequence would have 102 positions",
    '{"prompt": "x", "images": ["none.png"]}': "takes no images",
    '{"prompt": "x", "text_pair": 3}': "text_pair is 3, expected a text",
    '{"prompt": "x", "text_pair": "y"}': "text_pair is for encoders",
    r'{"prompt": "x", "text_pair": "\ud800"}': r"not JSON: it holds \ud800, half of a character",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_deployment(tmp_path_factory.mktemp("rows"), "gpt2", {"alpha": {"seed": 1}})[1]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, out = FAMILIES["bert"](), tmp_path_factory.mktemp("pairs") / "out"
    export_base(model, out, tokenizer=make_pair_tokenizer())
    return model, out


def run(folder: Path, *arguments: Any) -> Result:
    return CliRunner().invoke(main, ["run", str(folder), *map(str, arguments)])


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def good_rows(count: int) -> list[str]:
    return [json.dumps({"prompt": f"row {row}", "task": "alpha" if row % 2 else None}) for row in range(count)]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_row_is_named_and_none_is_answered(folder: Path, tmp_path: Path, line: str) -> None:
    """The bad row is in the second batch, and the blank line before it counts."""
    rows = write(tmp_path / "rows.jsonl", [*good_rows(10), "", line, *good_rows(2)])
    result = run(folder, "--jsonl", rows, "--max-new-tokens", 2)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert f"rows.jsonl:12: {BAD_LINES[line]}" in result.stderr or BAD_LINES[line] in result.stderr.split(":12: ")[1]


def test_others_are_answered_with_skip(folder: Path, tmp_path: Path) -> None:
    """Answers and errors are in the order of lines, and the exit code is that of bad input."""
    good = good_rows(len(BAD_LINES))
    lines = [line for pair in zip(BAD_LINES, good, strict=True) for line in pair]
    result = run(folder, "--jsonl", write(tmp_path / "rows.jsonl", lines), "--on-error", "skip", "--max-new-tokens", 2)
    entries = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 2
    assert f"{len(BAD_LINES)} rows could not be answered, the first in line 1: " in result.stderr
    assert len(entries) == len(lines)
    for number, (entry, message) in enumerate(zip(entries[::2], BAD_LINES.values(), strict=True)):
        assert entry.keys() == {"line", "error"}
        assert entry["line"] == 2 * number + 1
        assert f"rows.jsonl:{entry['line']}: " in entry["error"]
        assert message in entry["error"]
    alone = run(folder, "--jsonl", write(tmp_path / "good.jsonl", good), "--on-error", "skip", "--max-new-tokens", 2)
    assert alone.exit_code == 0
    assert entries[1::2] == [json.loads(line) for line in alone.stdout.splitlines()]


def test_nothing_is_left_to_answer(folder: Path, tmp_path: Path) -> None:
    result = run(folder, "--jsonl", write(tmp_path / "rows.jsonl", ["{", "3"]), "--on-error", "skip")
    assert [json.loads(line)["line"] for line in result.stdout.splitlines()] == [1, 2]
    assert result.exit_code == 2


def mean_of(model: Any, *texts: str) -> Iterator[float]:
    with torch.no_grad():
        states = model(**make_pair_tokenizer()(*texts, return_tensors="pt")).last_hidden_state[0]
    return states.mean(dim=0).numpy()


def test_a_pair_gives_the_states_of_transformers(pairs: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = pairs
    expected = mean_of(model, *TEXTS)
    single = json.loads(run(folder, TEXTS[0], "--text-pair", TEXTS[1]).stdout)
    rows = [{"prompt": TEXTS[0], "text_pair": TEXTS[1]}, {"prompt": TEXTS[0]}]
    path = write(tmp_path / "rows.jsonl", list(map(json.dumps, rows)))
    pair, alone = (json.loads(line) for line in run(folder, "--jsonl", path).stdout.splitlines())
    assert single == pair
    assert pair["text_pair"] == TEXTS[1]
    assert "text_pair" not in alone
    np.testing.assert_allclose(pair["mean"], expected, atol=1e-5)
    np.testing.assert_allclose(alone["mean"], mean_of(model, TEXTS[0]), atol=1e-5)
    assert np.abs(expected - mean_of(model, TEXTS[0])).max() > 1e-2


def test_wrong_use_of_pairs(pairs: tuple[Any, Path], folder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", good_rows(1))
    for arguments, message in (
        ([folder, "x", "--text-pair", "y"], "text_pair is for encoders"),
        ([pairs[1], "--jsonl", rows, "--text-pair", "y"], "--text-pair is for one prompt"),
        ([pairs[1], "x" * 40, "--text-pair", "y" * 40], "the sequence would have 83 positions"),
        ([folder, "x", "--on-error", "skip"], "--on-error is for the rows of --rows"),
        ([pairs[1], "x", "--text-pair", "y", "--on-error", "later"], "'later' is not one of 'stop', 'skip'"),
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr


def test_check_prompt_is_what_generate_would_refuse(folder: Path) -> None:
    with Deployment.open(folder) as deployment:
        deployment.check_prompt([5, 6, 7], task="alpha", max_new_tokens=61)
        with pytest.raises(ValueError, match="would have 65 positions"):
            deployment.check_prompt([5, 6, 7], task="alpha", max_new_tokens=62)


def test_batches_are_as_large_as_the_engine_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled engine's profile, on the host, takes fewer rows than a batch has elsewhere."""
    folder = tmp_path / "out"
    export_base(FAMILIES["gpt2"](), folder, target="portable", tokenizer=make_tokenizer())
    rows, settings = [PromptRow(f"row {row}", None) for row in range(10)], {"max_new_tokens": 3}
    generate, sizes = Deployment.generate, []

    def counted(self: Deployment, prompts: Any, **options: Any) -> Any:
        sizes.append(len(prompts))
        return generate(self, prompts, **options)

    monkeypatch.setattr(Deployment, "generate", counted)

    def answered(deployment: Deployment) -> list[str]:
        sizes.clear()
        ids = [row for row, _ in answers.encode_rows(deployment, rows, BadRows(skip=False))[1]]
        return [entry["text"] for entry in answers.generate_rows(deployment, rows, ids, None, settings)]

    with Deployment.open(folder) as deployment:
        expected = answered(deployment)
        assert sizes == [8, 2]
    for most, batches in ((1, [1] * 10), (3, [3, 3, 3, 1]), (20, [8, 2])):
        profile = Profile(batch=ShapeRange(1, 1, most), seq=ShapeRange(1, 8, 16), past=ShapeRange(0, 12, 55))
        backend = HostBackend(profile, in_place=False)
        with Deployment(folder, read_manifest(folder), backend, OpenOptions("portable")) as deployment:
            assert answered(deployment) == expected
            assert sizes == batches
