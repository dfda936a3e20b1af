"""``--json`` and ``--json-file``: the same of every verb."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from adalink.tools.common.report_file import ReportFile, write_text
from adalink.tools.terminal.terminal_text import echo, json_text

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class JsonOutput:
    """Where a verb gives its answer as JSON.

    Attributes:
        on_stdout: with ``--json``: stdout has the JSON and nothing else.
        file: of ``--json-file``; ``None`` without it.
    """

    on_stdout: bool = False
    file: Path | None = None

    def give(self, report: Mapping[str, Any], show: Callable[[], object], *, one_line: bool = False) -> None:
        """Print a report on stdout, as JSON or for people, and then write its file.

        Args:
            report: what there is to say; numbers that are not finite become ``null``.
            show: prints it for people; not called with ``--json``.
            one_line: print the JSON in one line.

        Raises:
            WriteError: the file cannot be written; stdout has the report.
        """
        text = json.dumps(_finite(report), indent=None if one_line else 2, allow_nan=False)
        if self.on_stdout:
            echo(text)
        else:
            show()
        if self.file is not None:
            write_text(self.file, f"{text}\n")

    @contextmanager
    def lines(self) -> Iterator[Callable[[Mapping[str, Any]], str]]:
        """Give records as JSON lines: what it gives keeps a record for the file, and returns its line for stdout.

        The file is written when the block ends without an error. Raises ``WriteError``.
        """
        kept: list[str] = []

        def add(record: Mapping[str, Any]) -> str:
            line = json_text(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False))
            if self.file is not None:
                kept.append(f"{line}\n")
            return line

        yield add
        if self.file is not None:
            write_text(self.file, "".join(kept))


def json_options(help_text: str) -> Callable[[F], F]:
    """``--json`` and ``--json-file``; the command takes them as one ``output: JsonOutput``. For ``Verb`` alone.

    Args:
        help_text: what ``--json`` prints.
    """

    def add(command: F) -> F:
        command = click.option("--json-file", type=ReportFile(), metavar="FILE", help="Write that JSON to a file.")(
            command
        )
        return click.option("--json", "as_json", is_flag=True, help=help_text)(command)

    return add


def join_json_options(values: dict[str, Any]) -> None:
    """Replace the values of both options by ``output``."""
    if "as_json" in values:
        values["output"] = JsonOutput(values.pop("as_json"), values.pop("json_file"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
