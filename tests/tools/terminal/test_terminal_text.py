"""No control character of somebody else's name or text reaches a terminal."""

from __future__ import annotations

import io
import logging
import re
import sys
import unicodedata

import click
import pytest
from click.testing import CliRunner, Result
from helpers.paths import REPOSITORY

from adalink.runtime.errors import AdapterError
from adalink.tools.cli import main
from adalink.tools.terminal.console import print_table, progress_bar, say
from adalink.tools.terminal.terminal_text import echo, echo_generated, printable
from adalink.tools.terminal.verbose import log_to_stderr

# Clears the screen, sets the window's title, overwrites the line, turns the direction of what follows.
EVIL = "topics\x1b[2J\x1b]0;title\x07\rall checks passed\x9b31m\u202eexe.png\u2066\x7f"
SHOWN = r"topics\x1b[2J\x1b]0;title\x07\rall checks passed\x9b31m\u202eexe.png\u2066\x7f"


def test_every_control_character_is_escaped() -> None:
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        is_control = unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(char) in (
            "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI",
        )  # fmt: skip
        if is_control and char not in "\t\n":
            assert printable(char) == ascii(char)[1:-1]
        elif code not in (0x61C, 0x200E, 0x200F):
            assert printable(char) == char


def as_verb(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Result:
    """An error of the verb 'doctor', through the real boundary."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("adalink.tools.commands.doctor.command", click.Command("doctor", callback=fail))
    return CliRunner().invoke(main, ["doctor"])


def test_errors_are_printed_without(monkeypatch: pytest.MonkeyPatch) -> None:
    result = as_verb(monkeypatch, AdapterError(f"task {EVIL}"))
    assert (result.exit_code, result.stderr) == (2, f"Error: task {SHOWN}\n")


@pytest.mark.parametrize("arguments", [[EVIL], ["inspect", EVIL], ["doctor", f"--{EVIL}"], ["run", "x", "y", EVIL]])
def test_wrong_use_is_quoted_without(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert printable(result.stderr) == result.stderr
    assert "topics" in result.stderr or arguments[0] == "run"


def test_tables_progress_and_log_are_printed_without(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(f"title {EVIL}", ["name"], [[EVIL]])
    say(EVIL)
    echo(EVIL)
    with progress_bar() as show:
        show(f"{EVIL}: half", 0.5)
    with log_to_stderr(1):
        logging.getLogger("adalink.test").info("loaded %s", EVIL)
    captured = capsys.readouterr()
    for text in captured:
        assert printable(text) == text
        assert r"topics\x1b[2J" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "expected"), [(Terminal, r"a\x1b[31mb" + "\n\tü\u200f🙂"), (io.StringIO, None)])
def test_generated_text_is_escaped_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], expected: str | None
) -> None:
    text, out = "a\x1b[31mb\n\tü\u200f🙂", stream()
    monkeypatch.setattr(sys, "stdout", out)
    echo_generated(text, nl=False)
    assert out.getvalue() == (text if expected is None else expected)


def test_commands_print_through_this_module_alone() -> None:
    """What is left is JSON, which escapes by itself, and empty lines."""
    printed = re.compile(
        r"click\.(?:secho|style)|(?<![\w.])print\(|click\.echo\((?!json\.dumps\((?:[^()]|\([^()]*\))*\)\)|\))"
    )
    allowed = {"error_boundary.py", "terminal_text.py"}
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted((REPOSITORY / "tools").rglob("*.py"))
        if path.name not in allowed and path.parent.name in ("commands", "common")
        for line in path.read_text(encoding="utf-8").splitlines()
        if printed.search(line)
    ]
    assert found == []
