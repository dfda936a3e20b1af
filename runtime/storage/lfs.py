"""Git LFS pointers: small text files that stand in for a large file, after a clone without Git LFS."""

from __future__ import annotations

import re
from pathlib import Path

_FIRST_LINE = b"version https://git-lfs.github.com/spec/"
_MOST_BYTES = 1024  # of a pointer, by the specification of Git LFS
_SIZE = re.compile(rb"^size (\d{1,20})$", re.MULTILINE)


def describe_pointer(data: bytes) -> str | None:
    """Fault and repair of a file's bytes if they are a Git LFS pointer, to follow the file's name; else ``None``."""
    if len(data) >= _MOST_BYTES or not data.startswith(_FIRST_LINE):
        return None
    size = _SIZE.search(data)
    real = f" of {size[1].decode()} bytes" if size else ""
    return (
        f"is a Git LFS pointer of {len(data)} bytes instead of the file{real}: it was cloned without Git LFS; run "
        "'git lfs install' and 'git lfs pull' in its repository"
    )


def find_pointer(path: Path) -> str | None:
    """The same for the file at ``path``; ``None`` if it cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size >= _MOST_BYTES:
            return None
        return describe_pointer(path.read_bytes())
    except OSError:
        return None
