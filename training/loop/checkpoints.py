"""``OUT.checkpoints``: the checkpoints of a training run, from which an interrupted one resumes."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import Trainer

from adalink.runtime.errors import AdaLinkError, ConfigError, WriteError
from adalink.runtime.storage.atomic import replace_file
from adalink.runtime.storage.decoding import decode_json

if TYPE_CHECKING:
    from torch import nn

SEARCH_FILE = "search.json"
_SETTINGS_FILE = "settings.json"
_WEIGHTS_FILE = "model.safetensors"
_STATE_FILE = "trainer_state.json"
_ZIPPED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


class CheckpointTrainer(Trainer):  # type: ignore[misc]  # transformers has no types for it
    """A ``Trainer`` that raises ``WriteError`` when a checkpoint cannot be written."""

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        try:
            super()._save_checkpoint(*args, **options)
        except (OSError, SafetensorError, RuntimeError) as error:  # the last is what torch.save makes of a full disk
            raise WriteError(
                f"checkpoints: cannot write {self.args.output_dir}: {error}; free space and go on with --resume"
            ) from error


def begin_checkpoints(folder: Path, record: dict[str, Any]) -> None:
    """Make the checkpoint folder and record the run's settings in it; raises ``WriteError``."""
    repair = "choose a writable --out"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise WriteError(f"cannot make {folder}: {error.strerror or error}; {repair}") from error
    data = (json.dumps(record, indent=2) + "\n").encode()
    try:
        replace_file(folder / _SETTINGS_FILE, data, repair=repair, durable=True)
    except WriteError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def removed_if_useless(folder: Path) -> Iterator[None]:
    """Remove the folder if an error ends the block and it holds nothing to resume from.

    After a full disk it stays: once space is free, the run can resume.
    """
    try:
        yield
    except WriteError:
        raise
    except AdaLinkError:
        if not (folder / SEARCH_FILE).is_file() and not _whole_checkpoints(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def last_checkpoint(folder: Path, record: dict[str, Any]) -> Path | None:
    """The latest complete checkpoint, ``None`` if there is none; refuses a run with other settings."""
    settings = folder / _SETTINGS_FILE
    if not settings.is_file():
        raise ConfigError(
            f"{folder} holds no interrupted run to resume: start one without --resume, and without that folder"
        )
    try:
        before = decode_json(settings.read_bytes(), dict[str, Any])
    except ValueError as error:
        raise ConfigError(f"{settings} is cut off: remove {folder} and start without --resume") from error
    now = json.loads(json.dumps(record))
    if changed := [name for name in {**now, **before} if before.get(name) != now.get(name)]:
        raise ConfigError(
            f"{folder}: the interrupted run had other {' and '.join(changed)}: {before.get(changed[0])}, now "
            f"{now.get(changed[0])}; resume with the same ones, or remove that folder"
        )
    return max(_whole_checkpoints(folder), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def restore(module: nn.Module, checkpoint: Path) -> list[dict[str, Any]]:
    """Load only the weights of a checkpoint; returns the log of the run until then."""
    module.load_state_dict(load_file(checkpoint / _WEIGHTS_FILE))
    history: list[dict[str, Any]] = json.loads((checkpoint / _STATE_FILE).read_bytes())["log_history"]
    return history


def _whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that can be read: a crash or a power loss may have cut one off at any file."""
    return [path for path in folder.glob("checkpoint-*") if _is_whole(path)]


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _STATE_FILE).read_bytes())  # transformers writes NaN, which is no JSON
        with safe_open(checkpoint / _WEIGHTS_FILE, framework="pt"):
            pass
    except (OSError, ValueError, RecursionError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(checkpoint / name) for name in _ZIPPED)
