"""Where a folder for onnxruntime-genai is written: nothing that somebody put there is lost."""

from __future__ import annotations

from pathlib import Path

from adalink.export.pipeline.stages import BASE, DIGEST_KEY, FRONT, TABLE, TASKS
from adalink.runtime.errors import DeploymentError
from adalink.runtime.storage.mmap import map_file
from adalink.runtime.storage.safetensors import read_metadata

CONFIG, HEAD, TOKENIZER_CONFIG = "genai_config.json", "head.onnx", "tokenizer_config.json"
_FILES = {CONFIG, TABLE, BASE, "tokenizer.json", TOKENIZER_CONFIG}
_GRAPH_ENDINGS = (".onnx", ".onnx.data")


def check_place(out: Path, *, replace: bool) -> None:
    """Check that a folder can be written.

    Args:
        out: the folder.
        replace: whether a folder for onnxruntime-genai may be there already.

    Raises:
        DeploymentError: something is there that is not to be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / CONFIG).is_file() or not (out / FRONT).is_file():
        raise DeploymentError(
            f"{out} is there, and no folder for onnxruntime-genai: it is not replaced; choose another"
        )
    if not replace:
        raise DeploymentError(f"{out} is there already: pass --replace to put this one in its place")
    others = sorted(str(path.relative_to(out)) for path in out.rglob("*") if not _is_own(path, out))
    if others:
        raise DeploymentError(
            f"{out} holds {others[0]!r}, which this command did not write, and nothing of a replaced folder is kept: "
            "move it away, or choose another folder"
        )


def _is_own(path: Path, out: Path) -> bool:
    if path.parent == out / TASKS:
        return path.suffix == ".safetensors" and _is_task(path)
    is_file = path.name in _FILES or path.name.endswith(_GRAPH_ENDINGS)
    return path.parent == out and ((path.is_file() and is_file) or (path.is_dir() and path.name == TASKS))


def _is_task(path: Path) -> bool:
    try:
        return DIGEST_KEY in read_metadata(map_file(path))
    except (OSError, ValueError):
        return False
