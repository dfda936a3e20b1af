"""``adalink train`` in a real terminal: one line of progress, and Ctrl-C."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from helpers.studies import write_base

from adalink.runtime.storage.adapter import read_adapter
from adalink.tools.terminal.step_line import StepLine, describe
from adalink.training.loop.options import StepProgress

# Steps that take long enough for a person, or a test, to press a key between two of them.
SCRIPT = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from transformers import TrainerCallback
from adalink.training import settings
from adalink.training.loop.step_callbacks import StepReporter
tell = StepReporter.on_step_end
def slow(self, args, state, control, **more):
    tell(self, args, state, control, **more)
    time.sleep({seconds})
StepReporter.on_step_end = slow
from adalink.tools.cli import main
main({arguments!r})
"""


class Terminal:
    """A command in a terminal of its own, 80 columns wide."""

    def __init__(self, work: Path, arguments: list[str], seconds: float) -> None:
        self.leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        script = SCRIPT.format(seconds=seconds, arguments=arguments)
        environment = os.environ | {"TERM": "dumb", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop("COLUMNS", None)
        streams = {"stdin": follower, "stdout": follower, "stderr": follower}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=work, env=environment, start_new_session=True, **streams
        )
        os.close(follower)
        self.shown = ""

    def wait(self, pattern: str, seconds: float = 90) -> None:
        """Read until there is a match of ``pattern``."""
        ends = time.monotonic() + seconds
        while not re.search(pattern, self.shown):
            ready, _, _ = select.select([self.leader], [], [], max(0, ends - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {self.shown!r}"
            self.shown += os.read(self.leader, 1 << 16).decode()

    def end(self) -> tuple[int, str]:
        """Exit code, and all that was shown."""
        while True:
            try:
                data = os.read(self.leader, 1 << 16)
            except OSError:  # Linux says so where the other side is closed
                break
            if not data:
                break
            self.shown += data.decode()
        os.close(self.leader)
        return self.process.wait(), self.shown


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_base(tmp_path / "my tiny")
    words = [letter * count for letter in "ab" for count in (2, 3, 4)]
    rows = [json.dumps({"prompt": word, "completion": f" {word[0]}"}) for word in words]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    return tmp_path


def command(out: str, steps: int = 40) -> list[str]:
    files = ["--base", "my tiny", "--data", "rows.jsonl", "--eval", "rows.jsonl", "--out", out]
    sizes = ["--max-steps", str(steps), "--rank", "4", "--batch-size", "2", "--max-length", "16", "--eval-steps", "4"]
    return ["train", *files, *sizes, "--device", "cpu"]


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(work: Path) -> None:
    """What it says is run as it stands, and gives the adapter of a run that nobody interrupted."""
    terminal = Terminal(work, command("out"), 0.1)
    terminal.wait(r"step [5-9] of 40")
    os.write(terminal.leader, b"\x03")
    code, shown = terminal.end()
    assert code == 130, shown
    assert "Traceback" not in shown
    assert not (work / "out").exists()
    step = re.search(r"Interrupted: out\.checkpoints has a checkpoint of step (\d+)\. To go on:", shown)
    assert step, shown
    assert (work / f"out.checkpoints/checkpoint-{step[1]}/trainer_state.json").is_file()
    again = re.search(r"\r\n  (adalink train .* --resume)\r\n", shown)
    assert again, shown
    words = shlex.split(again[1])
    assert words == ["adalink", *command("out"), "--resume"]
    resumed, whole = (Terminal(work, some, 0.0).end() for some in (words[1:], command("whole")))
    assert (resumed[0], whole[0]) == (0, 0), resumed[1]
    assert read_adapter(work / "out").digest == read_adapter(work / "whole").digest
    check_lines(whole[1])


def check_lines(shown: str) -> None:
    """The steps are one line of at most 79 characters, written over; what follows stands on its own."""
    (steps,) = [line for line in shown.split("\n") if "\rstep " in line or line.startswith("\rstep")]
    parts = [part for part in steps.split("\r") if part]
    assert all(len(part) <= 79 for part in parts)
    assert parts[-1].startswith("step 40 of 40, loss ")
    assert "left" not in parts[-1]
    assert "{'" not in shown
    assert "exact match of the adapter on 6 eval rows\r\n" in shown


@pytest.mark.slow
def test_second_ctrl_c_stops_at_once(work: Path) -> None:
    terminal = Terminal(work, command("out"), 3.0)
    terminal.wait(r"step 1 of 40")
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.wait("stopping after this step")
    started = time.monotonic()
    os.kill(terminal.process.pid, signal.SIGINT)
    code, shown = terminal.end()
    assert code == 130
    assert "Interrupted: out.checkpoints has no checkpoint yet. To go on:" in shown
    assert time.monotonic() - started < 30


def test_a_pipe_gets_a_line_where_a_figure_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    line = StepLine()
    for step in range(1, 7):
        loss, measured = (2.5 if step < 4 else 1.25), ({"loss": 0.5} if step > 4 else {})
        line.show(StepProgress(step, 6, loss, measured, 61.4 * (6 - step)))
    line.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 1 of 6, loss 2.5, 5:07 left",
        "step 4 of 6, loss 1.25, 2:03 left",
        "step 5 of 6, loss 1.25, eval loss 0.5, 1:01 left",
        "step 6 of 6, loss 1.25, eval loss 0.5",
    ]
    assert describe(StepProgress(1, 9000, None, {}, 7322.0)) == "step 1 of 9000, 2:02:02 left"
