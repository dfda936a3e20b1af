"""Atomic folders: a folder is written beside its place, then put there as a whole."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adalink.runtime.errors import WriteError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replace_folder(folder: Path, what: str) -> Iterator[Path]:
    """Write or replace a folder atomically: readers see the old folder or the new one.

    Args:
        folder: the folder, resolved; those above it are made.
        what: its name in errors, such as ``"adapter ./topics"``.

    Yields:
        An empty folder to write into. It takes the place of the other when the block ends without an error.

    Raises:
        WriteError: the disk refused: full, read-only or without permission. The old folder is unchanged.
    """
    staging: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        staging.chmod(0o755)
        yield staging
        _rename_over(staging, folder)
    except OSError as error:
        raise WriteError(
            f"{what}: cannot write {error.filename or folder}: {error.strerror or error}; what was there is as it was. "
            "Free space or choose a writable folder"
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _rename_over(staging: Path, folder: Path) -> None:
    """Rename ``staging`` to ``folder``; an old one ends up in ``staging``. One system call where the kernel has it."""
    if not folder.exists():
        staging.rename(folder)
        return
    # Windows has no library of that kind to look in.
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(staging), _AT_FDCWD, os.fsencode(folder), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(folder))
    aside = staging.with_name(f"{staging.name}.old")
    folder.rename(aside)
    try:
        staging.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
