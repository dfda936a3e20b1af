"""The command line's skeleton: lazy verbs, and the boundary between errors and exit codes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.tiny_deployments import write_adapter

from adalink.runtime.errors import AdapterError
from adalink.runtime.storage.adapter import AdapterConfig, make_adapter
from adalink.tools.cli import VERBS, main

HEAVY = ("torch", "onnx", "onnxruntime", "transformers", "numpy", "rich", "msgspec", "tokenizers")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import json, sys\n"
        "from adalink.tools.cli import main\n"
        f"sys.argv = ['adalink', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('LOADED ' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    done = run_python(code)
    loaded = json.loads(done.stdout.rpartition("LOADED ")[2])
    assert "click" in loaded  # the probe sees what is loaded
    assert not set(HEAVY) & set(loaded)


@pytest.mark.parametrize("verb", list(VERBS))
def test_verb_help_loads_no_framework_and_agrees_with_the_summary(verb):
    code = (
        "import json, sys, click\n"
        f"import adalink.tools.commands.{verb} as module\n"
        "context = click.Context(module.command, info_name='adalink')\n"
        "print(json.dumps([module.command.get_short_help_str(200), module.command.get_help(context), "
        "sorted({name.partition('.')[0] for name in sys.modules})]))\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    summary, help_text, loaded = json.loads(done.stdout)
    assert not {"torch", "onnx", "onnxruntime", "transformers"} & set(loaded)
    assert summary == VERBS[verb]
    assert "Example" in help_text


def invoke_verb(monkeypatch, body):
    """Run ``body`` as the verb 'doctor', through the real boundary."""
    verb = click.Command("doctor", callback=body)
    monkeypatch.setattr("adalink.tools.commands.doctor.command", verb)
    return CliRunner().invoke(main, ["doctor"])


def test_user_error_is_a_message_and_exit_code_2(monkeypatch):
    def fail():
        raise AdapterError("adapter x: adapter_model.safetensors is missing")

    result = invoke_verb(monkeypatch, fail)
    assert result.exit_code == 2
    assert result.stderr == "Error: adapter x: adapter_model.safetensors is missing\n"
    assert result.stdout == ""


def test_bug_keeps_its_traceback(monkeypatch):
    def fail():
        raise RuntimeError("a bug")

    result = invoke_verb(monkeypatch, fail)
    assert isinstance(result.exception, RuntimeError)
    assert result.exit_code == 1


def test_interrupt_exits_130(monkeypatch):
    def fail():
        raise KeyboardInterrupt

    result = invoke_verb(monkeypatch, fail)
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr


DESCRIBED = ["inspect", "adapter"]
FULL = Path("/dev/full")


@pytest.fixture
def described(tmp_path):
    """A folder with something to describe."""
    config = AdapterConfig(
        base_model_name_or_path="tiny", base_fingerprint=f"sha256:{'0' * 64}", hidden_size=8, rank=2,
        activation="identity", bias=False, modalities=("text",), scope="all",
    )  # fmt: skip
    weights = {"text.down.weight": np.ones((2, 8), np.float32), "text.up.weight": np.ones((8, 2), np.float32)}
    write_adapter(tmp_path / "adapter", make_adapter(config, weights))
    return tmp_path


@pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_output_on_a_full_disk_is_a_message_and_exit_code_2(described, options):
    command = [sys.executable, "-m", "adalink.tools", *DESCRIBED, *options]
    with FULL.open("w") as full:
        done = subprocess.run(command, cwd=described, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "Error: cannot write: No space left on device; free space, and run the command again\n"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_output_that_nobody_reads_exits_141(described, options):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "adalink.tools", *DESCRIBED, *options]
    done = subprocess.run(command, cwd=described, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch):
    def fail():
        raise PermissionError(errno.EACCES, "Permission denied")

    assert isinstance(invoke_verb(monkeypatch, fail).exception, PermissionError)


def test_missing_package_names_the_extra(monkeypatch):
    def fail():
        raise ModuleNotFoundError("No module named 'optimum'", name="optimum")

    result = invoke_verb(monkeypatch, fail)
    assert result.exit_code == 2
    assert "pip install 'adalink-kit[export]'" in result.stderr


def test_missing_module_of_ours_is_a_bug(monkeypatch):
    def fail():
        raise ModuleNotFoundError("No module named 'adalink.nonesuch'", name="adalink.nonesuch")

    assert isinstance(invoke_verb(monkeypatch, fail).exception, ModuleNotFoundError)


def test_unknown_verb_and_option_exit_2():
    for arguments in (["frobnicate"], ["doctor", "--frobnicate"]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert "No such" in result.stderr


def test_real_process_prints_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "adalink.tools", "inspect", str(tmp_path / "absent.onnx")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
