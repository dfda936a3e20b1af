"""The commands of ``python -m studies``: what they derive, what they refuse, and what their help says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
from helpers.paths import REPOSITORY
from helpers.studies import contents, finished_runs, invoke_command, write_study

from studies.commands import main
from studies.run_store import write_run

COMMANDS = ("pack", "run", "summary", "unpack")


def report_files(out):
    """Bytes of what a study says, by path."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "runs" not in path.relative_to(out).parts[0]
    }


def never(*arguments):
    """In place of ``perform``."""
    raise AssertionError("a run was done")


@pytest.mark.parametrize("is_packed", [False, True])
def test_summary_derives_every_file_again(done, copy, monkeypatch, is_packed):
    monkeypatch.setattr("studies.schedule.perform", never)
    study, out = copy
    if is_packed:
        invoke_command("pack", out)
    before = report_files(out)
    assert {"summary.json", "study.md", "study.html", "plots/differences.png"} <= before.keys()
    for name in before:
        (out / name).write_text("damaged")
    assert json.loads(invoke_command("summary", study, "--out", out, "--json").stdout) == done[2]
    assert report_files(out) == before
    assert "AdaLink 8" in invoke_command("summary", study, "--out", out).stdout


def test_summary_counts_a_missing_run_as_open(copy, monkeypatch):
    monkeypatch.setattr("studies.schedule.perform", never)
    study, out = copy
    name = next(name for name, run in contents(out).items() if run["run"]["seed"] == 2)
    (out / "runs" / name).unlink()
    summary = json.loads(invoke_command("summary", study, "--out", out, "--json").stdout)
    assert summary["runs"] == {"finished": 6, "open": 1}


def test_summary_does_not_count_runs_of_other_settings(places, tmp_path):
    """Their base, data and rows have the same names, and other digests."""
    study, out = write_study(places, tmp_path), tmp_path / "out"
    for name, content in finished_runs(2).items():
        write_run(out, name, content)
    summary = json.loads(invoke_command("summary", study, "--out", out, "--json").stdout)
    assert summary["runs"] == {"finished": 0, "open": 7}


def test_summary_of_a_folder_without_runs_is_refused(done, tmp_path):
    message = invoke_command("summary", done[0], "--out", tmp_path, code=2).stderr
    assert f"{tmp_path}: holds no finished run; name the folder that the study was run with as --out" in message
    assert not list(tmp_path.iterdir())


def test_a_study_file_that_is_missing_is_refused(tmp_path):
    for command in ("run", "summary"):
        message = invoke_command(command, tmp_path / "no.toml", "--out", tmp_path, code=2).stderr
        assert "no.toml: cannot be read: No such file or directory" in message


def test_help_lists_every_command_with_examples_that_can_be_called():
    assert tuple(sorted(main.commands)) == COMMANDS
    for command in ("", *COMMANDS):
        text = invoke_command(command, "--help").stdout if command else invoke_command("--help").stdout
        examples = re.findall(r"^ +python -m studies (.+)$", text, re.MULTILINE)
        assert examples
        for example in examples:
            name, *arguments = shlex.split(example)
            assert command in ("", name)
            main.commands[name].make_context(name, arguments)
            assert all((REPOSITORY / file).is_file() for file in arguments if file.endswith(".toml"))


def test_help_and_packing_load_no_torch(tmp_path):
    for name, content in finished_runs(2).items():
        write_run(tmp_path, name, content)
    program = (
        "import sys\n"
        "from studies.commands import main\n"
        f"out = {str(tmp_path)!r}\n"
        "for arguments in (['--help'], ['run', '--help'], ['pack', out], ['unpack', out]):\n"
        "    main(arguments, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True)
    assert len(contents(tmp_path)) == 2
