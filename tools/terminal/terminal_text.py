"""Text for a terminal: control characters are shown as escapes, never sent.

Names of tasks, files and tensors, messages of templates and texts of models come from others. An escape sequence in one
could rewrite the screen, and a bidi control could show a name as another one.
"""

from __future__ import annotations

import re
import sys

import click

# All of C0 but tab and line feed, DEL, C1, and lone surrogates, which cannot be encoded.
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"
_BIDI = "\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_IN_NAMES = re.compile(f"[{_CONTROLS}{_BIDI}]")
_IN_TEXTS = re.compile(f"[{_CONTROLS}]")


def printable(text: str) -> str:
    """Text with control characters and bidi controls written as Python's escapes; tabs and line feeds stay."""
    return _IN_NAMES.sub(_escape, text)


def json_text(text: str) -> str:
    """JSON with control characters and bidi controls written as JSON's escapes: a terminal may show it as it is."""
    return _IN_NAMES.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def echo(text: str = "", *, err: bool = False) -> None:
    """Print one line of the kit's own, on stdout or stderr."""
    click.echo(printable(text), err=err)


def echo_generated(text: str, *, nl: bool = True) -> None:
    """Print text of a model: as it is into a file or pipe, without control characters on a terminal."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    # Without `color`, click would take escape sequences out of what goes into a file.
    click.echo(_IN_TEXTS.sub(_escape, text) if is_terminal else text, nl=nl, color=True)


def _escape(match: re.Match[str]) -> str:
    return ascii(match.group())[1:-1]
