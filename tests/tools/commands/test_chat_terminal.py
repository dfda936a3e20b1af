"""`adalink chat` in a real terminal: keys, and what the model writes."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from helpers.chats import Reference

# A process whose steps take long enough for a person, or a test, to press a key.
SCRIPT = """
import fcntl, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from adalink.runtime.generation.running_batch import RunningBatch
step = RunningBatch.step
def slow(self):
    time.sleep({seconds})
    step(self)
RunningBatch.step = RunningBatch.speculate = slow
{patch}
from adalink.tools.cli import main
main({arguments!r})
"""
EVIL = """
from adalink.runtime.text.tokenizer import TextStream
push = TextStream.push
TextStream.push = lambda self, token: push(self, token) + "\\x1b[2J\\r"
"""
# The planted fault: what the model writes is printed as it is.
RAW = """
from adalink.tools.commands import chat
chat.echo_generated = lambda text, nl=True: print(text, end="\\n" if nl else "", flush=True)
"""


class Terminal:
    """`adalink chat` in a terminal of its own."""

    def __init__(self, folder: Path, *options: str, seconds: float = 0.0, patch: str = "") -> None:
        script = SCRIPT.format(seconds=seconds, arguments=["chat", str(folder), *options], patch=patch)
        self.leader, follower = pty.openpty()
        settings = termios.tcgetattr(follower)
        settings[3] |= termios.NOFLSH  # Ctrl-C discards no text that was not read yet
        termios.tcsetattr(follower, termios.TCSANOW, settings)
        environment = os.environ | {"TERM": "dumb", "PYTHONPATH": os.pathsep.join(sys.path)}
        streams = {"stdin": follower, "stdout": follower, "stderr": follower}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], env=environment, start_new_session=True, **streams
        )
        os.close(follower)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def type_until(self, text: str, pattern: str) -> str:
        """Type a text, each second again, until there is a match."""
        for _ in range(30):
            self.type(text)
            with contextlib.suppress(AssertionError):
                return self.wait(pattern, seconds=1)
        return self.wait(pattern)

    def wait(self, pattern: str, seconds: float = 90) -> str:
        """What is shown up to and with a match of ``pattern``, from the end of the last one."""
        ends = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            ready, _, _ = select.select([self.leader], [], [], max(0, ends - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {self.shown!r}"
            self.shown += os.read(self.leader, 1 << 16).decode()
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def close(self) -> int:
        """End it with Ctrl-D, at its prompt; returns its exit code."""
        self.type("\x04")
        code = self.process.wait(30)
        os.close(self.leader)
        return code


def test_ctrl_c_ends_a_reply_which_is_kept(chat_folder: Path) -> None:
    reference = Reference(chat_folder)
    whole = reference.reply("Hi", "alpha", max_new_tokens=40)
    terminal = Terminal(chat_folder, "--max-new-tokens", "40", "--task", "alpha", seconds=0.1)
    terminal.wait("alpha> ")
    terminal.type("Hi\n")
    shown = terminal.wait("Hi\r\n.{3}")
    terminal.type("\x03")
    shown += terminal.wait(r"\[stopped\]\r\n")
    _, _, printed = shown.partition("Hi\r\n")
    # The terminal shows the key as ^C, in the midst of the reply.
    printed = printed.removesuffix("\r\n[stopped]\r\n")
    cuts = [printed[: at.start()] + printed[at.end() :] for at in re.finditer(r"\^C", printed)]
    (reply,) = [cut for cut in cuts if whole.startswith(cut)]
    assert 3 <= len(reply) < len(whole)
    reference.messages[-1]["content"] = reply
    expected = reference.reply("Bye", "alpha", max_new_tokens=3)
    terminal.wait("alpha> ")
    terminal.type("Bye\n")
    assert terminal.wait("Bye\r\n.{3}").endswith(f"Bye\r\n{expected}")
    terminal.type("\x03")
    terminal.wait(r"\[stopped\]\r\nalpha> ")
    assert terminal.close() == 0


def test_errors_and_ctrl_c_leave_the_prompt(chat_folder: Path) -> None:
    terminal = Terminal(chat_folder, "--max-new-tokens", "2")
    terminal.wait("> ")
    terminal.type("/task gamma\n")
    terminal.wait("Error: task 'gamma' is not deployed[^\n]*\r\n> ")
    # Python's readline misses a Ctrl-C that comes just before it waits for a key, until the next one.
    terminal.type_until("\x03", "/quit or Ctrl-D leaves\r\n> ")
    terminal.type("Hi\n")
    expected = Reference(chat_folder).reply("Hi", max_new_tokens=2)
    assert re.escape(expected) in re.escape(terminal.wait("limit of 2 tokens\\]\r\n> "))
    assert terminal.close() == 0


@pytest.mark.parametrize("patch", [EVIL, EVIL + RAW], ids=["escaped", "planted"])
def test_no_control_character_of_the_model_reaches_the_terminal(chat_folder: Path, patch: str) -> None:
    terminal = Terminal(chat_folder, "--max-new-tokens", "4", patch=patch)
    terminal.wait("> ")
    terminal.type("Hi\n")
    shown = terminal.wait("limit of 4 tokens\\]\r\n> ")
    assert terminal.close() == 0
    is_raw = "\x1b[2J" in shown
    assert is_raw == (RAW in patch)
    assert (r"\x1b[2J\r" in shown) == (not is_raw)
