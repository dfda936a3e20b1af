"""What an interrupted training says: the command that goes on, as it was typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from adalink.tools.command_line.hub_options import hub_options
from adalink.tools.command_line.json_output import json_options
from adalink.tools.command_line.resumption import resumable
from adalink.tools.command_line.verb import VerbGroup
from adalink.tools.terminal.step_line import StepLine


@click.group(cls=VerbGroup)
def root() -> None:
    pass


@root.command(name="train")
@click.option("-o", "--out", type=click.Path(path_type=Path))
@click.option("--resume", is_flag=True)
@hub_options
@json_options("JSON.")
def interrupted(out: Path, **_: Any) -> None:
    with resumable(out, StepLine()):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (["-o", "{out}"], ["-o", "{out}", "--resume"]),
        (["--resume", "--out={out}", "--json", "-q"], ["--out={out}", "--json", "-q", "--resume"]),
        (["--token", "hf_secret", "-o", "{out}", "--revision", "v1"], ["-o", "{out}", "--revision", "v1", "--resume"]),
        (
            ["--token=hf_secret", "-o", "{out}", "--json-file", "r.json"],
            ["-o", "{out}", "--json-file", "r.json", "--resume"],
        ),
    ],
)
def test_command_that_goes_on(typed: list[str], named: list[str], tmp_path: Path) -> None:
    """Options that verbs share are joined before a verb runs; a token is not shown."""
    (tmp_path / "out.checkpoints").mkdir()
    result = CliRunner().invoke(root, ["train", *(word.format(out=tmp_path / "out") for word in typed)])
    assert result.exit_code == 130, result.exception
    assert result.stderr.splitlines()[-1] == "  " + " ".join(["adalink", "train", *named]).format(out=tmp_path / "out")
