"""Files of a folder for the web: large ones in pieces, each with its digest.

Hosts of static files limit a file's size, browsers cache small files only, and a piece that came damaged is read again
alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

PIECE_BYTES = 24_000_000

Entry = dict[str, object]


def split_file(folder: Path, name: str, limit: int) -> Entry:
    """Split a file that is larger than ``limit``, in place; the files are no links any more.

    Args:
        folder: the folder.
        name: the file's path in it.
        limit: most bytes of a piece.

    Returns:
        Its size and pieces, each with path, size and digest. A small file is a piece by itself.
    """
    whole = (folder / name).rename(folder / f"{name}.whole")
    pieces: list[Entry] = []
    size = whole.stat().st_size
    with whole.open("rb") as stream:
        while data := stream.read(limit):
            part = name if size <= limit else f"{name}.{len(pieces):03d}"
            (folder / part).write_bytes(data)
            pieces.append({"path": part, "size": len(data), "sha256": f"sha256:{hashlib.sha256(data).hexdigest()}"})
    whole.unlink()
    return {"size": size, "pieces": pieces}
