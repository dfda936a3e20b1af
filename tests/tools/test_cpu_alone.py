"""Every verb where only the extra ``cpu`` is installed: it works, or says in one line which extra to install."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from helpers.code_blocks import check_command
from helpers.installed import modules_without, run_hidden
from helpers.tiny_deployments import make_deployment

from adalink.tools.cli import VERBS, main

ONE_LINE = re.compile(r"Error: .*pip install (-\S+ )*'adalink-kit\[[a-z,-]+\]'\n")
# What works without any other package. The others say what they need.
WORKS = {
    "split",
    "run",
    "run jsonl",
    "classify",
    "chat",
    "remove",
    "bench",
    "inspect deployment",
    "inspect adapter",
    "doctor",
    "doctor footprint",
    "config",
    "completion",
}
# Of these the answer is JSON, or a script.
SAYS_NOTHING_NEXT = {"doctor", "doctor footprint", "completion"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model folder, a deployment of it, and an adapter folder."""
    root = tmp_path_factory.mktemp("cpu")
    model, folder = make_deployment(root, "gpt2", {"alpha": {"seed": 1}, "beta": {"seed": 2}})
    return model, folder, root / "adapters" / "alpha"


def commands(made: tuple[Path, Path, Path], root: Path) -> dict[str, list[Any]]:
    """A call of every verb, in their order."""
    model, original, adapter = made
    folder = shutil.copytree(original, root / "deployment")
    (root / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "task": "alpha"}\n')
    rows = root / "rows.jsonl"
    (root / "two.csv").write_text("text,label\na,x\nb,y\nc,x\nd,y\n")
    return {
        "quickstart": ["quickstart", model, rows, "--out", root / "quick"],
        "split": ["split", root / "two.csv", "--out", root / "parts"],
        "run": ["run", folder, "Hello", "--task", "alpha", "--max-new-tokens", "2", "--threads", "1"],
        "run jsonl": ["run", folder, "--jsonl", rows, "--max-new-tokens", "2", "--threads", "1"],
        "chat": ["chat", folder, "--task", "alpha", "--threads", "1"],
        "serve": ["serve", folder, "--port", "0"],
        "inspect deployment": ["inspect", folder],
        "inspect adapter": ["inspect", adapter],
        "inspect model": ["inspect", model],
        "inspect onnx": ["inspect", folder / "tasks/alpha/adapter.onnx"],
        "doctor": ["doctor", "--json"],
        "doctor footprint": ["doctor", "--footprint", "--json"],
        "config": ["config"],
        "completion": ["completion", "bash"],
        "classify": [
            "classify",
            folder,
            "Hello",
            "--labels",
            "a",
            "--labels",
            "b",
            "--task",
            "alpha",
            "--threads",
            "1",
        ],
        "embed": ["embed", folder, "Hello", "--threads", "1"],
        "eval": ["eval", folder, "--data", rows, "--task", "alpha", "--threads", "1"],
        "compress": ["compress", adapter, "--deployment", folder, "--rows", rows, "--out", root / "small"],
        "bench": ["bench", folder, "--task", "alpha", "--threads", "1"],
        "verify": ["verify", folder, "--against", model, "--quick"],
        "train": ["train", "--base", model, "--data", rows, "--eval", rows, "--out", root / "trained"],
        "export base": ["export", "base", model, "--out", root / "other"],
        "export adapter": ["export", "adapter", adapter, "--out", folder, "--name", "gamma"],
        "export adapter fold": ["export", "adapter", adapter, "--out", folder, "--replace", "--fold", "table"],
        "export kv-cache": ["export", "kv-cache", folder],
        "export engine": ["export", "engine", folder, "--backend", "tensorrt"],
        "export engine rtx": ["export", "engine", folder, "--backend", "tensorrt-rtx"],
        "export genai": ["export", "genai", folder, "--task", "alpha", "--out", root / "genai"],
        "export lora": ["export", "lora", adapter, "--base", model, "--format", "peft", "--out", root / "lora"],
        "remove": ["remove", folder, "alpha"],
    }


def test_calls_are_of_every_verb(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    context = click.Context(main)
    verbs = set()
    for verb in VERBS:
        command = main.get_command(context, verb)
        inner = command.commands if isinstance(command, click.Group) else {}
        verbs |= {(verb, name) for name in inner} or {(verb,)}
    called = {tuple(call[: 2 if call[0] == "export" else 1]) for call in commands(made, tmp_path).values()}
    assert called == verbs


def test_hidden_modules_are_those_of_other_extras() -> None:
    hidden = modules_without(["cpu"])
    assert {"torch", "transformers", "onnx", "optimum", "ml_dtypes", "accelerate"} <= set(hidden)
    assert not {"onnxruntime", "numpy", "msgspec", "tokenizers", "safetensors", "click", "rich", "adalink"} & set(
        hidden
    )
    assert "onnxruntime" in modules_without([])
    assert "torch" not in modules_without(["train"])


def test_every_verb_works_or_names_the_extra(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    calls = commands(made, tmp_path)
    hidden = modules_without(["cpu"])
    (tmp_path / "site").mkdir()
    results = dict(zip(calls, run_hidden(hidden, tmp_path / "site", list(calls.values())), strict=True))
    for name, (code, _, stderr, error) in results.items():
        assert error is None, (name, error)
        assert "Traceback" not in stderr, name
        if name == "embed":  # the base is no encoder, and the package that it needs is there
            assert (code, stderr.count("\n")) == (2, 1), stderr
            assert "pip install" not in stderr
        elif name in WORKS:
            assert code == 0, (name, stderr)
            check_next(name, stderr)
        else:
            assert code == 2, (name, stderr)
            assert ONE_LINE.fullmatch(stderr), (name, stderr)
    backends = json.loads(results["doctor"][1])["backends"]
    assert [name for name, entry in backends.items() if entry["works"]] == ["onnxruntime-cpu"]
    assert "train]" in results["train"][2]
    assert "cpu,eval,export,train]" in results["quickstart"][2]
    assert not (tmp_path / "other").exists()


def check_next(name: str, stderr: str) -> None:
    """The last line is a command that the kit takes."""
    words = shlex.split((stderr.splitlines() or [""])[-1])
    if name in SAYS_NOTHING_NEXT:
        assert words[:1] != ["next:"]
    else:
        assert words[:2] == ["next:", "adalink"], (name, stderr)
        check_command(words[2:])


def test_a_package_that_is_not_known_is_named_too(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The extra is a guess then, and still no traceback."""
    adapter = commands(made, tmp_path)["export adapter"]
    (tmp_path / "site").mkdir()
    (result,) = run_hidden(modules_without(["cpu"]), tmp_path / "site", [adapter], known=False)
    assert result[0] == 2
    assert ONE_LINE.fullmatch(result[2])
