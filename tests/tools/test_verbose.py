"""``adalink --verbose``: the kit's log on stderr while a verb runs, and nothing left of it afterwards."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.tiny_deployments import make_deployment

from adalink.runtime.logs import ROOT
from adalink.tools.cli import main
from adalink.tools.command_line.verb import Verb


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_deployment(tmp_path_factory.mktemp("verbose"), "mistral", {"alpha": {"seed": 1}})[1])


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def test_verbose_logs_events_on_stderr_and_leaves_stdout_alone(folder: Path) -> None:
    command = ("run", folder, "Hello", "--task", "alpha", "--max-new-tokens", 2)
    silent, verbose = run(*command), run("-v", *command)
    assert verbose.stdout == silent.stdout
    silent_stderr = f"next: adalink serve {folder}\n"
    assert silent.stderr == silent_stderr
    assert f"INFO adalink.runtime.deployment: opened {folder}: variant" in verbose.stderr
    assert "INFO adalink.runtime.tasks.registry: loaded task alpha" in verbose.stderr
    assert run(*command).stderr == silent_stderr, "the next command of this process is silent again"


@pytest.mark.parametrize(("options", "expected"), [([], ""), (["-v"], "event"), (["-vv"], "event, detail")])
def test_level_follows_the_count_of_the_option(
    monkeypatch: pytest.MonkeyPatch, options: list[str], expected: str
) -> None:
    def body() -> None:
        logger = logging.getLogger("adalink.runtime.deployment")
        logger.info("event")
        logger.debug("detail")

    monkeypatch.setattr("adalink.tools.commands.doctor.command", Verb("doctor", callback=body))
    lines = run(*options, "doctor").stderr.splitlines()
    assert ", ".join(line.rpartition(": ")[2] for line in lines) == expected


def test_failed_verb_leaves_no_handler_and_no_level(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    logger = logging.getLogger(ROOT)
    before = logger.level, list(logger.handlers)
    monkeypatch.setattr("adalink.tools.commands.doctor.command", Verb("doctor", callback=fail))
    assert isinstance(CliRunner().invoke(main, ["-vv", "doctor"]).exception, RuntimeError)
    assert (logger.level, logger.handlers) == before
