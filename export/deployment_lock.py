"""Lock of a deployment: one writer at a time, and the journal of what writers put into the folder.

The lock is ``.lock``, held with ``flock``. Its first line is one that only this kit writes: any other file of that name
is somebody's own and is not touched. Lines after the header are the journal. A writer names there what it is about to
write or to leave behind, and flushes it first. So the next writer knows which files are the kit's, whenever the last
one was killed. See docs/decisions/0002-atomic-deployments.md.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from adalink.runtime.errors import BusyError, DeploymentError
from adalink.runtime.storage.atomic import sync
from adalink.runtime.storage.decoding import decode_json

LOCK_FILE = ".lock"
_SIGNATURE = b"adalink-kit deployment lock 1\n"
# Of one length whatever the process: a new holder overwrites the header and nothing after it.
_HEADER = _SIGNATURE + b"process %020d\n"
_HEADER_BYTES = len(_HEADER % 0)
_MAX_LOCK_BYTES = 64 << 20
_NO_LINKS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class JournalEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file or folder that a writer made.

    Attributes:
        path: relative to the deployment.
        sha256: its digest; empty for a file of an earlier manifest, and for a folder.
    """

    path: str
    sha256: str = ""


class DeploymentLock:
    """A held lock.

    Attributes:
        journal: what writers put into the deployment and have not cleared away.
        is_legacy: whether the lock was written by a kit before 0.3.0, which kept no journal.
    """

    def __init__(self, folder: Path, descriptor: int, *, has_manifest: bool) -> None:
        """Take over the lock file; raises ``DeploymentError`` for a file that is no lock of this kit."""
        self._folder, self._descriptor = folder, descriptor
        data = _read(descriptor)
        if not is_lock(data, has_manifest=has_manifest):
            raise DeploymentError(
                f"{folder / LOCK_FILE} is not a lock of this kit: it is somebody's own file; move it away, or choose "
                "another folder"
            )
        self.is_legacy = data.strip().isdigit()
        self.journal = _decode_journal(data)
        if self.is_legacy or len(data) < _HEADER_BYTES:
            os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _HEADER % os.getpid(), 0)

    def record(self, entries: Iterable[JournalEntry]) -> None:
        """Add to the journal, and flush it; raises ``OSError``."""
        added = tuple(entries)
        lines = b"".join(msgspec.json.encode(entry) + b"\n" for entry in added)
        os.pwrite(self._descriptor, lines, os.fstat(self._descriptor).st_size)
        os.fsync(self._descriptor)
        sync(self._folder)
        self.journal += added

    def clear(self) -> None:
        """Empty the journal: nothing is left to clear away."""
        os.ftruncate(self._descriptor, _HEADER_BYTES)
        self.journal = ()


def is_lock(data: bytes, *, has_manifest: bool) -> bool:
    """Whether these are the bytes of a lock: of this kit, of an earlier one beside a manifest, or of none yet."""
    return data.startswith(_SIGNATURE) or not data or (has_manifest and data.strip().isdigit() and len(data) <= 32)


def read_own_lock(folder: Path) -> bytes | None:
    """Bytes of a new deployment's lock; ``None`` if there is none, or it is no lock of this kit."""
    path = folder / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY | _NO_LINKS)
    except OSError:
        return None
    try:
        data = _read(descriptor) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    finally:
        os.close(descriptor)
    return data if data is not None and is_lock(data, has_manifest=False) else None


@contextmanager
def hold_lock(folder: Path, *, has_manifest: bool) -> Iterator[DeploymentLock]:
    """Hold the deployment's lock; the system drops it when the process ends, however it ends.

    Args:
        folder: the deployment.
        has_manifest: whether it has a manifest, beside which the lock of an earlier kit counts as one.

    Raises:
        BusyError: another process holds it.
        DeploymentError: the file is a link, no file, or no lock of this kit.
    """
    path = folder / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINKS, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise DeploymentError(f"{path} is a link or a folder, expected a file: move it away") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DeploymentError(f"{path} is a device or a pipe, expected a file: move it away")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"deployment {folder} is being changed by process {_holder(descriptor)}: wait for it to end, then run "
                "this again"
            ) from error
        yield DeploymentLock(folder, descriptor, has_manifest=has_manifest)
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> bytes:
    data = bytearray()
    while len(data) < _MAX_LOCK_BYTES and (chunk := os.pread(descriptor, 1 << 20, len(data))):
        data += chunk
    return bytes(data)


def _holder(descriptor: int) -> str:
    """The process that holds the lock."""
    header = os.pread(descriptor, _HEADER_BYTES, 0)
    number = header.removeprefix(_SIGNATURE).removeprefix(b"process ").strip()
    return str(int(number)) if number.isdigit() else "unknown"


def _decode_journal(data: bytes) -> tuple[JournalEntry, ...]:
    """The journal's entries; a line that a kill cut short says nothing, since its files were not written yet."""
    entries = []
    for line in data[_HEADER_BYTES:].split(b"\n")[:-1]:
        try:
            entries.append(decode_json(line, JournalEntry))
        except msgspec.DecodeError:
            continue
    return tuple(entries)
