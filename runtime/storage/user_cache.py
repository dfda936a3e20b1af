"""Per-user cache files. They save time and can be deleted; files and folders of other users are never trusted.

The cache is ``adalink`` in the user's cache folder. It is used only where that folder, and the one of each kind below
it, belong to the user and nobody else may write to them. Otherwise nothing is read from it, and nothing is written.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from pathlib import Path

from adalink.runtime.errors import WriteError
from adalink.runtime.storage.atomic import replace_file

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


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
    if not (_is_private(path.parent.parent) and _is_private(path.parent)):
        return None
    try:
        # Without O_NONBLOCK a pipe would wait for somebody who writes to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(stream.fileno())
            return stream.read() if stat.S_ISREG(status.st_mode) and _is_own(status) else None
    except OSError:
        return None


def write_cache_file(path: Path, data: bytes | memoryview) -> None:
    """Write a cache file atomically; errors are ignored, and so is a folder in which others may write."""
    with contextlib.suppress(OSError, WriteError):
        if make_private_folder(path.parent):
            replace_file(path, data, private=True)


def make_private_folder(folder: Path, levels: int = 2) -> bool:
    """Make a folder of the cache; whether it is the user's alone. Raises ``OSError``.

    Earlier kits left the first two folders to the umask: where these are the user's own, the rights of others to write
    are taken away. A folder on the third level holds files that other programs read unchecked, so it is not mended.

    Args:
        folder: the folder.
        levels: how many folders at the end of its path are the cache's.
    """
    paths = [folder, *folder.parents][:levels][::-1]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for level, path in enumerate(paths):
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
        if hasattr(os, "geteuid") and stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and level < 2:
            path.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS_MAY_WRITE)
    return all(map(_is_private, paths))


def _is_private(folder: Path) -> bool:
    """Whether a folder is one itself, belongs to this user, and nobody else may write to it."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and _is_own(status)


def _is_own(status: os.stat_result) -> bool:
    """Whether a file is this user's, and nobody else may write to it; Windows has no such owner."""
    return not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_MAY_WRITE)
