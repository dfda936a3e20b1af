"""Atomic writes: a file is written under a temporary name, then renamed.

For a folder see ``adalink.runtime.storage.atomic_folder``, for a deployment ``adalink.export.writer``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from adalink.runtime.errors import WriteError

# Windows has neither links to worry about nor these two flags.
_PLAIN = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_PROBE_BYTES = 1 << 16
_NEW_FILE, _ANY_FILE = _PLAIN | os.O_EXCL, _PLAIN | os.O_TRUNC


def replace_file(
    path: Path,
    data: bytes | memoryview,
    *,
    repair: str = "free space or choose a writable folder",
    durable: bool = False,
    private: bool = False,
) -> None:
    """Write or replace a file atomically: readers see the old file or the new one.

    Args:
        path: the file; its folder must exist.
        data: the file's bytes.
        repair: how to repair a refused write; the end of the message.
        durable: flush before the rename, so that a power loss leaves the old file or the new one.
        private: only the owner may read or write the file.

    Raises:
        WriteError: the disk refused: full, read-only or without permission. The old file is unchanged.
    """
    with draft_file(path, repair=repair, durable=durable, private=private) as (stream, _):
        stream.write(data)


@contextmanager
def draft_file(
    path: Path,
    *,
    repair: str = "free space or choose a writable folder",
    durable: bool = True,
    private: bool = False,
) -> Iterator[tuple[BinaryIO, Path]]:
    """Likewise a file that is written piece by piece; it takes its place when the block ends without an error.

    Args:
        path: as for ``replace_file``.
        repair: likewise.
        durable: likewise.
        private: likewise.

    Yields:
        The file, and its temporary name.

    Raises:
        WriteError: as ``replace_file``, for any ``OSError`` of the block.
    """
    draft = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        try:
            # A new file, whatever lies there: never the target of a link that somebody else has put there.
            descriptor = os.open(draft, _NEW_FILE, 0o600 if private else 0o666)
            with os.fdopen(descriptor, "wb") as stream:
                yield stream, draft
                _flush(stream, durable=durable)
            draft.replace(path)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}; {repair}") from error


def make_folder(folder: Path, *, repair: str = "free space or choose a writable folder") -> None:
    """Make a folder and those above it, where they are missing; raises ``WriteError``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot make {folder}: {error.strerror or error}; {repair}") from error


def check_writable(folder: Path, *, repair: str = "free space or choose a writable folder") -> None:
    """Write a small file into a folder, or where it will be made, and remove it: what follows takes minutes.

    Raises:
        WriteError: the disk refused: full, read-only or without permission.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    probe = there / f".{folder.name}.{os.urandom(4).hex()}"
    try:
        try:
            write_through(probe, bytes(_PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"cannot write in {there}: {error.strerror or error}; {repair}") from error


def write_through(path: Path, data: bytes | memoryview, *, durable: bool = True) -> None:
    """Write a file directly, flushed to the disk if ``durable``; raises ``OSError``, also for a link."""
    with os.fdopen(os.open(path, _ANY_FILE, 0o666), "wb") as stream:
        _write(stream, data, durable=durable)


def _write(stream: BinaryIO, data: bytes | memoryview, *, durable: bool) -> None:
    stream.write(data)
    _flush(stream, durable=durable)


def _flush(stream: BinaryIO, *, durable: bool) -> None:
    if durable:
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk; raises ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
