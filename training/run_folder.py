"""The folders that a training run writes, checked before it begins: the adapter's, and its checkpoints beside it."""

from __future__ import annotations

from pathlib import Path

from adalink.runtime.errors import AdapterError, ConfigError
from adalink.runtime.storage.adapter import CONFIG_FILE


def check_target(folder: Path) -> None:
    """Refuse to replace a folder that is not an adapter, or the current one; raises ``AdapterError``."""
    if folder.is_dir() and folder.samefile("."):
        raise AdapterError(
            f"{folder} is the current folder, and an adapter folder is replaced as a whole: name another, or go to its "
            "parent and name it there"
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{folder} is not empty and holds no {CONFIG_FILE}: it is no adapter; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file: choose a folder for the adapter")


def checkpoints_of(folder: Path) -> Path:
    """Where the checkpoints of a run lie that writes the adapter ``folder``."""
    return folder.parent / f"{folder.name}.checkpoints"


def check_fresh(folder: Path) -> None:
    """Refuse to start over an interrupted run's checkpoints; raises ``ConfigError``."""
    if folder.exists():
        raise ConfigError(
            f"{folder} holds the checkpoints of an interrupted run: go on with --resume, or remove that folder"
        )
