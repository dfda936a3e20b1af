"""Where a LoRA is written: nothing else is overwritten there."""

from __future__ import annotations

import json
from pathlib import Path

from adalink.runtime.errors import DeploymentError, ModelError
from adalink.runtime.storage.adapter import CONFIG_FILE, WEIGHTS_FILE
from adalink.training.models.gguf.header import read_header

# What PEFT saves in a folder.
_PEFT_FILES = {CONFIG_FILE, WEIGHTS_FILE, "README.md"}


def check_place(out: Path, form: str, *, replace: bool) -> None:
    """Check that a LoRA can be written.

    Args:
        out: a folder for the format ``"peft"``, a file for ``"gguf"``.
        form: the format.
        replace: whether a LoRA may be there already.

    Raises:
        DeploymentError: something is there that is not to be replaced.
    """
    if form == "gguf" and out.is_dir():
        raise DeploymentError(f"{out} is a folder, and the format gguf is one file: name a file, such as {out}.gguf")
    if form == "peft" and out.exists() and not out.is_dir():
        raise DeploymentError(f"{out} is a file, and the format peft is a folder: name a folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (_is_gguf_lora(out) if form == "gguf" else _is_peft_lora(out)):
        raise DeploymentError(f"{out} is there, and is no LoRA: it is not replaced; choose another place")
    if not replace:
        raise DeploymentError(f"{out} is there already: pass --replace to put this LoRA in its place")


def _is_gguf_lora(path: Path) -> bool:
    try:
        return read_header(path).metadata.get("general.type") == "adapter"
    except ModelError:
        return False


def _is_peft_lora(folder: Path) -> bool:
    if not {path.name for path in folder.iterdir()} <= _PEFT_FILES:
        return False
    try:
        return bool(json.loads((folder / CONFIG_FILE).read_bytes())["peft_type"] == "LORA")
    except (OSError, ValueError, KeyError, TypeError):
        return False
