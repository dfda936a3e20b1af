"""What the shell offers, and that it offers it quickly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from adalink.runtime.backends import BACKENDS
from adalink.tools.cli import VERBS, main
from adalink.tools.command_line import shell_completion


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    variants = {"int4": {"backends": ["onnxruntime-cpu"]}, "fast": {"backends": ["tensorrt"]}}
    manifest = {"tasks": {"topics": {}, "tweets": {}, "authors": {}}, "variants": variants}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def offered(*words: object, incomplete: str = "") -> list[str]:
    completion = ShellComplete(main, {}, "adalink", "_ADALINK_COMPLETE")
    return [item.value for item in completion.get_completions([*map(str, words)], incomplete)]


def test_names_of_the_deployment_are_offered(folder: Path) -> None:
    assert offered("run", folder, "--task", incomplete="t") == ["topics", "tweets"]
    assert offered("export", "engine", folder, "-t") == ["topics", "tweets", "authors"]
    assert offered("remove", folder, incomplete="a") == ["authors"]
    assert offered("eval", folder, "--data", "x", "--variant") == ["int4", "fast"]
    assert offered("serve", folder, "-b") == ["onnxruntime-cpu", "tensorrt"]


@pytest.mark.parametrize(
    "words",
    [
        ["export", "base"],
        ["quickstart"],
        ["inspect"],
        ["train", "-m"],
        ["verify", "-m"],
        ["export", "engine", "--model"],
    ],
)
def test_the_shell_finds_models(words: list[str]) -> None:
    completion = ShellComplete(main, {}, "adalink", "_ADALINK_COMPLETE")
    assert [(item.type, item.value) for item in completion.get_completions(words, "mod")] == [("file", "mod")]


def test_without_a_deployment_all_backends_are_offered(tmp_path: Path) -> None:
    assert offered("run", tmp_path, "--task") == []
    (tmp_path / "manifest.json").write_text("{")
    assert offered("run", tmp_path, "--task") == []
    assert tuple(offered("run", "--backend")) == shell_completion.BACKENDS == BACKENDS


def test_verbs_and_options_are_offered() -> None:
    assert offered(incomplete="e") == [verb for verb in VERBS if verb.startswith("e")]
    assert set(offered("export")) == {"adapter", "base", "engine", "genai", "kv-cache", "lora", "prefix", "web"}
    assert "--max-new-tokens" in offered("run", "x", incomplete="--max")


@pytest.mark.parametrize("words", [["run", "--ta"], ["train", "--b"]])
def test_no_framework_is_imported(words: list[str]) -> None:
    code = (
        "import sys\nfrom adalink.tools.cli import main\n"
        "try:\n    main(prog_name='adalink')\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules), 'click' in sys.modules)\n"
    )
    variables = {
        "COMP_WORDS": f"adalink {' '.join(words)}",
        "COMP_CWORD": str(len(words)),
        "_ADALINK_COMPLETE": "bash_complete",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set() True"
    assert f"plain,{words[-1]}" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_calls_adalink(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert f"_ADALINK_COMPLETE={shell}_complete" in result.stdout
    assert result.stderr == ""  # a shell reads it at each start
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=True)
