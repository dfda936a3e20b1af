"""Writing a report as JSON: whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from adalink.runtime.storage.atomic import replace_file


class ReportFile(click.Path):
    """A report file: written after the work, with its folder checked to be writable before."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; fails where its folder is missing or not writable."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not (path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)):
            self.fail(f"cannot write in {path.parent}: choose a writable folder", param, ctx)
        return path


def write_json(path: Path, report: Mapping[str, object], *, option: str = "--json") -> None:
    """Write ``report``, strictly JSON (no NaN), beside ``path`` and rename it in; raises ``WriteError``.

    ``option`` is the one that says where, for the message.
    """
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    replace_file(path, text.encode(), repair=f"choose a writable place with {option}", private=True)
