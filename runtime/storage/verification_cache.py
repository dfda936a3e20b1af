"""Verification cache: files that this user has verified are not read again until they change.

What counts as a change is in ``adalink.runtime.storage.stamp``. A file changed less than two seconds before it was read
is not remembered, since a second change could leave the same stamp. A full check reads every byte.
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
from adalink.runtime.storage.graph_files import check_graph_files, check_referenced
from adalink.runtime.storage.integrity import VerifiedFiles, check_size, locate, map_verified, stamp_at, verify_files
from adalink.runtime.storage.manifest import Manifest, Variant
from adalink.runtime.storage.stamp import Stamp, is_settled
from adalink.runtime.storage.user_cache import cache_path, read_cache_file, write_cache_file

_LOG = get_logger(__name__)


class _VerifiedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Digest and stamp of a verified file, and the files that it refers to, if it is a graph."""

    sha256: str
    stamp: Stamp
    refers_to: tuple[str, ...]


def verify_variant(folder: Path, manifest: Manifest, variant: Variant, *, full_check: bool) -> VerifiedFiles:
    """Verify what opening a variant of the base loads, and that its graphs refer to no other files.

    Args:
        folder: the deployment.
        manifest: its manifest.
        variant: the variant.
        full_check: read every byte of every file of the deployment.

    Raises:
        IntegrityError: as ``verify_once`` does.
        GraphError: a graph refers to a file that the variant does not list.
    """
    paths = tuple(dict.fromkeys((manifest.base.embeddings, *variant.files)))  # one file may be both
    if full_check:
        verify_files(folder, manifest, sorted(manifest.files.keys() - set(paths)))
        verified = verify_files(folder, manifest, paths)
        check_graphs(folder, manifest, () if variant.is_compiled else variant.files)
    elif variant.is_compiled:  # a plan is code: read in full each time
        verified = verify_once(folder, manifest, (manifest.base.embeddings,))
        verified.merge(verify_files(folder, manifest, variant.files))
    else:
        verified = verify_once(folder, manifest, paths)
    return verified


def verify_once(
    folder: Path, manifest: Manifest, paths: Iterable[str], progress: Callable[[str], None] | None = None
) -> VerifiedFiles:
    """Verify files against their recorded size and SHA-256; files verified before are read only after a change.

    Graphs among them may refer to these files and to no others.

    Args:
        folder: the deployment.
        manifest: its manifest.
        paths: the files.
        progress: called with each path that is read.

    Raises:
        IntegrityError: a file is missing, unreadable, truncated, altered, or a link out of the deployment.
        GraphError: a graph refers to another file.
    """
    paths = tuple(paths)
    memory = _memory_file(folder)
    known = _recall(memory) if memory else {}
    learnt: dict[str, _VerifiedFile] = {}
    verified = VerifiedFiles(folder, manifest)
    unknown: dict[str, Stamp] = {}
    for relative in paths:
        path = locate(folder, relative)
        stamp, expected = stamp_at(path), manifest.files[relative].sha256
        check_size(manifest, relative, stamp[2])
        record = known.get(relative)
        if record is not None and (record.sha256, record.stamp) == (expected, stamp):
            _LOG.debug("%s has not changed since its digest was checked: not read again", path)
            check_referenced(relative, record.refers_to, paths)
        else:
            unknown[relative] = stamp
        verified.add(relative, stamp)
    started = time.time_ns()
    verify_files(folder, manifest, unknown, progress)
    for relative, stamp in unknown.items():
        refers_to = check_graphs(folder, manifest, paths, relative)
        if stamp_at(locate(folder, relative)) == stamp and is_settled(stamp, started):
            learnt[relative] = _VerifiedFile(manifest.files[relative].sha256, stamp, refers_to)
    if learnt and memory:
        write_cache_file(memory, msgspec.json.encode({**known, **learnt}))
    return verified


def check_graphs(folder: Path, manifest: Manifest, files: tuple[str, ...], one: str | None = None) -> tuple[str, ...]:
    """Check that graphs among ``files``, or ``one`` of them, refer to no others; returns what they refer to.

    Raises ``GraphError``, or ``IntegrityError`` as ``map_verified`` does.
    """
    refers_to: list[str] = []
    for relative in files if one is None else (one,):
        if relative.endswith(".onnx"):
            refers_to += check_graph_files(relative, map_verified(folder, manifest, relative).data, files)
    return tuple(refers_to)


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
