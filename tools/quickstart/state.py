"""``quickstart.json``: which steps of a quick start are done, and the digests that show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.atomic import make_folder, replace_file
from adalink.runtime.storage.decoding import decode_json
from adalink.tools.quickstart.steps import Step

STATE_FILE = "quickstart.json"


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step that was done: its command, and what ``Step.proof`` gave then."""

    command: tuple[str, ...]
    proof: Any


class State:
    """The steps that were done in a folder."""

    def __init__(self, folder: Path) -> None:
        """Read them.

        Raises:
            ConfigError: the folder holds other things, or a file of another form.
        """
        self._path = folder / STATE_FILE
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

    def command_of(self, name: str) -> tuple[str, ...]:
        """The command of a step that was done; empty for another."""
        return self._records[name].command if name in self._records else ()

    def is_done(self, step: Step) -> bool:
        """Whether a step was done by this very command, and all that it read and wrote is as it was."""
        record, evidence = self._records.get(step.name), step.evidence()
        return record is not None and evidence is not None and record == Record(step.words, evidence)

    def add(self, step: Step) -> None:
        """Record that a step is done; raises ``WriteError``."""
        self._records[step.name] = Record(step.words, step.evidence())
        make_folder(self._path.parent)
        replace_file(self._path, msgspec.json.format(msgspec.json.encode(self._records), indent=2) + b"\n")
