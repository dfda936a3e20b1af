"""Writing a report: whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click


class ReportFile(click.Path):
    """A report file: written after the work, with its folder; that this can be is checked before."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path; fails where its folder, or the one that it would be made in, is not writable."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        there = next((folder for folder in path.absolute().parents if folder.exists()), path.absolute())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            self.fail(f"cannot write in {path.parent}: choose a writable folder", param, ctx)
        return path


def write_json(path: Path, report: Mapping[str, object], *, option: str = "--json-file") -> None:
    """Write ``report``, strictly JSON (no NaN), as ``write_text`` writes a text."""
    write_text(path, json.dumps(report, indent=2, allow_nan=False) + "\n", option=option)


def write_text(path: Path, text: str, *, option: str = "--json-file") -> None:
    """Write ``text`` beside ``path`` and rename it in, in a folder that is made if it is missing.

    Args:
        path: the file.
        text: its content.
        option: the one that says where, for the message.

    Raises:
        WriteError: it cannot be written.
    """
    from adalink.runtime.storage.atomic import make_folder, replace_file  # here, because it brings numpy along

    repair = f"choose a writable place with {option}"
    make_folder(path.parent, repair=repair)
    replace_file(path, text.encode(), repair=repair, private=True)
