"""``quickstart.json``: which steps of a quick start are done, and the digests that show it.

Paths in it start at its own folder: the same files are the same however they are typed, and also after a move.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.atomic import make_folder, replace_file
from adalink.runtime.storage.decoding import decode_json
from adalink.tools.quickstart.steps import Step

STATE_FILE = "quickstart.json"


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step that was done.

    Attributes:
        command: its words, without ``adalink``.
        defaults: what the environment and the configuration file said of its verb, by option.
        proof: what ``Step.proof`` gave then.
    """

    command: tuple[str, ...]
    defaults: dict[str, Any]
    proof: Any


class State:
    """The steps that were done in a folder."""

    def __init__(self, folder: Path, defaults: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Read them.

        Args:
            folder: the folder.
            defaults: what the environment and the configuration file say, by verb and option.

        Raises:
            ConfigError: the folder holds other things, or a file of another form.
        """
        self._path, self._defaults = folder / STATE_FILE, defaults or {}
        self._records: dict[str, Record] = {}
        if self._path.is_file():
            try:
                self._records = decode_json(self._path.read_bytes(), dict[str, Record])
            except msgspec.DecodeError as error:
                raise ConfigError(
                    f"{self._path} is damaged: {error}; remove it: all steps are then done again"
                ) from error
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is not empty and holds no {STATE_FILE}: choose another --out")

    def rows_of(self, split: Step) -> str | None:
        """The rows that a split was made of, unless they are those of this step; ``None`` if there was no split."""
        before, now = self._records.get(split.name), self._command(split)
        return None if before is None or before.command[1:2] == now[1:2] else before.command[1]

    def is_done(self, step: Step) -> bool:
        """Whether a step was done by this very command, and all that it read and wrote is as it was."""
        record = self._record(step)
        return record.proof is not None and record == self._records.get(step.name)

    def add(self, step: Step) -> None:
        """Record that a step is done; raises ``WriteError``."""
        self._records[step.name] = self._record(step)
        make_folder(self._path.parent)
        replace_file(self._path, msgspec.json.format(msgspec.json.encode(self._records), indent=2) + b"\n")

    def _record(self, step: Step) -> Record:
        defaults = msgspec.to_builtins(self._defaults.get(step.verb, {}))
        return Record(self._command(step), defaults, step.evidence())

    def _command(self, step: Step) -> tuple[str, ...]:
        """The words of a step, with paths as they are from the folder."""
        return tuple(self._from_here(word) if isinstance(word, Path) else word for word in step.words)

    def _from_here(self, path: Path) -> str:
        return Path(os.path.relpath(path.expanduser().resolve(), self._path.parent.resolve())).as_posix()
