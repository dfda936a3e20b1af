"""Verification cache: files that this user has verified are not read again until they change.

A file counts as unchanged while device, inode, size and both time stamps stay the same. The owner of a file cannot set
back its change time. A file changed less than two seconds before it was read is not remembered, since a second change
could leave the same stamp. Two changes go undetected: a disk that corrupts bytes, and writes through an older memory
map. A full check reads every byte.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from adalink.runtime.logs import get_logger
from adalink.runtime.storage.decoding import decode_json
from adalink.runtime.storage.digest import digest_bytes
from adalink.runtime.storage.integrity import check_size, locate, reading, verify_files
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.user_cache import cache_path, read_cache_file, write_cache_file

_SETTLED_NS = 2_000_000_000

_LOG = get_logger(__name__)

# Device, inode, size, modification and change time in nanoseconds.
Stamp = tuple[int, int, int, int, int]


class _VerifiedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Digest and stamp of a verified file."""

    sha256: str
    stamp: Stamp


def verify_once(
    folder: Path, manifest: Manifest, paths: Iterable[str], progress: Callable[[str], None] | None = None
) -> None:
    """Verify files against their recorded size and SHA-256; files verified before are read only after a change.

    Args:
        folder: the deployment.
        manifest: its manifest.
        paths: the files.
        progress: called with each path that is read.

    Raises:
        IntegrityError: a file is missing, unreadable, truncated, altered, or a link out of the deployment.
    """
    memory = _memory_file(folder)
    known = _recall(memory) if memory else {}
    learnt: dict[str, _VerifiedFile] = {}
    for relative in paths:
        path = locate(folder, relative)
        stamp, expected = _stamp(path), manifest.files[relative].sha256
        check_size(manifest, relative, stamp[2])
        if known.get(relative) == _VerifiedFile(expected, stamp):
            _LOG.debug("%s has not changed since its digest was checked: not read again", path)
            continue
        started = time.time_ns()
        verify_files(folder, manifest, [relative], progress)
        if _stamp(path) == stamp and max(stamp[3:]) < started - _SETTLED_NS:
            learnt[relative] = _VerifiedFile(expected, stamp)
    if learnt and memory:
        write_cache_file(memory, msgspec.json.encode({**known, **learnt}))


def _stamp(path: Path) -> Stamp:
    with reading(path):
        status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _memory_file(folder: Path) -> Path | None:
    """Cache file of a deployment, in the user's folder, where others who can write the deployment cannot."""
    name = digest_bytes(os.fsencode(folder.resolve())).removeprefix("sha256:")[:32]
    return cache_path("verified", f"{name}.json")


def _recall(memory: Path) -> dict[str, _VerifiedFile]:
    """Earlier verifications; none if the file is missing, damaged or not trusted."""
    data = read_cache_file(memory)
    try:
        return {} if data is None else decode_json(data, dict[str, _VerifiedFile])
    except msgspec.DecodeError:
        return {}
