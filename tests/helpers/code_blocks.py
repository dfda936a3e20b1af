"""Blocks of code in Markdown pages: found, run, and their command lines held against the real commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from helpers.warm_python import WarmPython

from adalink.tools.cli import main

NOT_RUN = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->")
_FENCE = re.compile(r"^(?P<indent> *)(?P<mark>`{3,})(?P<language>[\w+-]*).*$")
_SEPARATORS = {";", "&&", "||", "|", "&", "do", "then", "("}
_RUN = """
import json, sys, warnings
warnings.filterwarnings("error", category=DeprecationWarning, module=r"adalink\\Z")
names = {"__name__": "__main__"}
for page, line, code in json.load(sys.stdin):
    exec(compile("\\n" * line + code, page, "exec"), names)
"""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path of the page, as shown.
        line: number of the fence's line, from 1.
        language: word behind the fence; empty for none.
        code: text between the fences, without their indentation.
        reason: why it is not run; None for a block that is.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None = None


def find_blocks(page: str, text: str) -> list[Block]:
    """All fenced blocks of a page. ``<!-- not run: reason -->`` stands right before the fence of one that is not run.

    Raises:
        ValueError: a fence does not end, or no reason is given.
    """
    blocks: list[Block] = []
    lines = text.split("\n")
    number, reason = 0, None
    while number < len(lines):
        line = lines[number]
        if marker := NOT_RUN.search(line):
            reason = marker[1]
            if not reason:
                raise ValueError(f"{page}:{number + 1}: a block is not run, and no reason is given")
        elif fence := _FENCE.match(line):
            end = next((i for i in range(number + 1, len(lines)) if lines[i].strip() == fence["mark"]), None)
            if end is None:
                raise ValueError(f"{page}:{number + 1}: the block does not end")
            code = textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n"
            blocks.append(Block(page, number + 1, fence["language"], code, reason))
            number, reason = end, None
        elif line.strip():
            reason = None
        number += 1
    return blocks


def run_blocks(blocks: list[Block], folder: Path, python: WarmPython) -> str:
    """Run Python blocks in order, in one namespace and one process of its own; returns what they print.

    Raises:
        AssertionError: one fails; the message has its traceback with the page's lines.
    """
    given = json.dumps([(block.page, block.line, block.code) for block in blocks])
    ran = python.run([sys.executable, "-c", _RUN], cwd=folder, env=_environment(), input=given)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def _environment() -> dict[str, str]:
    source = str(Path(__file__).parents[2] / "src")
    path = os.pathsep.join((source, os.environ["PYTHONPATH"])) if os.environ.get("PYTHONPATH") else source
    return {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def command_lines(block: Block) -> Iterator[tuple[int, list[str]]]:
    """The ``adalink`` commands of a block: line number and words of each, without ``adalink``."""
    lines = block.code.split("\n")
    number = 0
    while number < len(lines):
        first, whole = number, lines[number].strip().removeprefix("$ ")
        while whole.endswith("\\") and number + 1 < len(lines):
            number += 1
            whole = f"{whole[:-1]} {lines[number].strip()}"
        number += 1
        if re.search(r"\badalink\b", whole):
            for words in _commands(whole):
                yield block.line + 1 + first, words


def _commands(line: str) -> Iterator[list[str]]:
    if not re.match(r"(adalink|for|if|while|[A-Z_]+=\S*|.*(&&|\|\||;)) ?", line):
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in _SEPARATORS or set(word) <= set("<>&|;()"):
            if words[:1] == ["adalink"]:
                yield words[1:]
            words = [] if word in _SEPARATORS else ["..."]
        elif words or not re.fullmatch(r"[A-Z_]+=\S*", word):
            words.append(word)


def check_command(words: list[str]) -> None:
    """Hold a command line against the real commands: verbs, options, choices, and what must be given.

    Three dots among the words stand for what is left out; then nothing is missing. Files need not exist.

    Raises:
        click.UsageError: it would be refused.
    """
    command: click.Command = main
    context = click.Context(
        main, info_name="adalink", **main.context_settings
    )  # the help option is made once, of these
    while isinstance(command, click.Group):
        name = words[0] if words else ""
        if not words or name.startswith("-"):
            break
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"no such command: {context.command_path} {name}")
        command, words = found, words[1:]
        context = click.Context(command, info_name=name, parent=context, **command.context_settings)
    values, rest, _ = command.make_parser(context).parse_args(args=[word for word in words if word != "..."])
    if set(words) & set(context.help_option_names):
        return
    if rest:
        raise click.UsageError(f"{context.command_path} takes no {' '.join(rest)!r}")
    for parameter in command.get_params(context):
        value = values.get(parameter.name)
        if parameter.required and not value and "..." not in words:
            raise click.MissingParameter(ctx=context, param=parameter)
        if isinstance(parameter.type, click.Choice | click.types.IntParamType | click.types.FloatParamType) and value:
            for one in value if isinstance(value, list | tuple) else [value]:
                parameter.type.convert(one, parameter, context)
