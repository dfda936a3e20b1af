"""Where a folder for browsers and Node is written: nothing that somebody put there is lost."""

from __future__ import annotations

from pathlib import Path

import msgspec

from adalink.export.pipeline.stages import TASKS
from adalink.runtime.errors import DeploymentError
from adalink.runtime.storage.decoding import decode_json

INDEX, LIBRARIES = "web.json", "lib"
# What is served beside the model: a page, its worker, and the module that runs the model, in Node too.
PAGE = Path(__file__).parent / "page"


class _Piece(msgspec.Struct):
    path: str


class _Entry(msgspec.Struct):
    pieces: list[_Piece]


class _Index(msgspec.Struct):
    """What ``web.json`` says of the files beside it."""

    files: dict[str, _Entry]
    libraries: list[str]


def check_place(out: Path, *, replace: bool) -> None:
    """Check that a folder can be written.

    Args:
        out: the folder.
        replace: whether such a folder may be there already.

    Raises:
        DeploymentError: something is there that is not to be replaced.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    index = _read_index(out)
    if index is None:
        raise DeploymentError(f"{out} is there, and no folder for the web: it is not replaced; choose another")
    if not replace:
        raise DeploymentError(f"{out} is there already: pass --replace to put this one in its place")
    pieces = [piece.path for entry in index.files.values() for piece in entry.pieces]
    known = {INDEX, LIBRARIES, TASKS, *index.libraries, *pieces, *(path.name for path in PAGE.iterdir())}
    others = sorted({path.relative_to(out).as_posix() for path in out.rglob("*")} - known)
    if others:
        raise DeploymentError(
            f"{out} holds {others[0]!r}, which this command did not write, and nothing of a replaced folder is kept: "
            "move it away, or choose another folder"
        )


def _read_index(out: Path) -> _Index | None:
    try:
        return decode_json((out / INDEX).read_bytes(), _Index)
    except (OSError, ValueError):
        return None
