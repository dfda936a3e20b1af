"""Per-user cache files. They save time and can be deleted; files of other users are never trusted."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from adalink.runtime.errors import WriteError
from adalink.runtime.storage.atomic import replace_file


def cache_path(folder: str, name: str) -> Path | None:
    """Path of a cache file; ``None`` for a user without a home folder.

    Args:
        folder: the kind of cache.
        name: the file's name.
    """
    windows = sys.platform == "win32"
    root = os.environ.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME")
    try:
        root = root or str(Path.home() / ("AppData/Local" if windows else ".cache"))
    except RuntimeError:
        return None
    return Path(root, "adalink", folder, name)


def read_cache_file(path: Path) -> bytes | None:
    """Bytes of a cache file; ``None`` if it is missing or another user could have written it."""
    try:
        with path.open("rb") as stream:
            if hasattr(os, "getuid"):
                status = os.fstat(stream.fileno())
                if status.st_uid != os.getuid() or status.st_mode & 0o022:
                    return None
            return stream.read()
    except OSError:
        return None


def write_cache_file(path: Path, data: bytes | memoryview) -> None:
    """Write a cache file atomically; errors are ignored."""
    with contextlib.suppress(OSError, WriteError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, data, private=True)
