"""Integrity: a deployment's files are verified against its manifest before use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from adalink.runtime.errors import IntegrityError
from adalink.runtime.storage.digest import digest_bytes, digest_stream
from adalink.runtime.storage.graph_files import check_graph_files
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.mmap import Bytes, map_file
from adalink.runtime.storage.stamp import Stamp, is_settled, open_regular, stamp_of


def locate(folder: Path, relative: str) -> Path:
    """Path of a deployment's file; raises ``IntegrityError`` if it is missing or a link leads outside."""
    root = folder.resolve()
    path = root / relative
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise IntegrityError(
            f"{path}: the manifest lists this file, but it cannot be found: export it again, or reload the "
            "deployment if another process has just replaced it"
        ) from error
    if not resolved.is_relative_to(root):
        raise IntegrityError(f"{path} is a link to {resolved}, outside the deployment: replace it by the file itself")
    if not resolved.is_file():
        raise IntegrityError(f"{path} is not a file: export it again")
    return resolved


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert read errors into ``IntegrityError``."""
    try:
        yield
    except OSError as error:
        raise IntegrityError(
            f"{path} cannot be read: {error.strerror}; make it readable, export it again, or reload the deployment if "
            "another process has just replaced it"
        ) from error


class VerifiedFiles:
    """Files of a deployment as they were verified, for what is opened by its path afterwards.

    An engine opens its files itself. Those that changed between the check and the end of loading show here.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._stamps: dict[str, Stamp] = {}
        self._young: list[str] = []

    def add(self, relative: str, stamp: Stamp) -> None:
        """Note a file that was just verified; it had this stamp before and after."""
        self._stamps[relative] = stamp
        if not is_settled(stamp):
            self._young.append(relative)

    def merge(self, other: VerifiedFiles) -> None:
        """Add the files of another check of the same deployment."""
        self._stamps |= other._stamps
        self._young += other._young

    def check_unchanged(self, undo: Callable[[], None] = lambda: None) -> None:
        """Check that the files are still those that were verified.

        A file that was written just before the check could change without a trace: it is read again.

        Args:
            undo: called before an error is raised; closes what was loaded.

        Raises:
            IntegrityError: a file changed since.
        """
        try:
            for relative in self._young:
                _verify_file(self._folder, self._manifest, relative)
            for relative, stamp in self._stamps.items():
                if stamp_at(locate(self._folder, relative)) != stamp:
                    raise _changed(relative)
        except IntegrityError:
            undo()
            raise


def verify_files(
    folder: Path,
    manifest: Manifest,
    paths: Iterable[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerifiedFiles:
    """Verify files against their recorded size and SHA-256.

    Args:
        folder: the deployment.
        manifest: its manifest.
        paths: the files; by default all files of the manifest.
        progress: called with each path before it is read, by the thread of the caller.

    Raises:
        IntegrityError: a file is missing, unreadable, truncated, altered, or a link out of the deployment.
    """
    names = sorted(manifest.files) if paths is None else list(paths)

    def announced() -> Iterator[str]:
        for relative in names:
            if progress is not None:
                progress(relative)
            yield relative

    verified = VerifiedFiles(folder, manifest)
    # Digests are computed without Python's lock: as many files at a time as there are cores.
    with ThreadPoolExecutor(max(1, min(len(names), os.cpu_count() or 1))) as pool:
        stamps = pool.map(partial(_verify_file, folder, manifest), announced())
        for relative, stamp in zip(names, stamps, strict=True):
            verified.add(relative, stamp)
    return verified


def stamp_at(path: Path) -> Stamp:
    """A file's stamp; raises ``IntegrityError``."""
    with reading(path):
        return stamp_of(path.stat())


def _verify_file(folder: Path, manifest: Manifest, relative: str) -> Stamp:
    """Verify one file; returns the stamp that it had all the while."""
    path = locate(folder, relative)
    with reading(path), open_regular(path) as stream:
        stamp = stamp_of(os.fstat(stream.fileno()))
        check_size(manifest, relative, stamp[2])
        _check_digest(manifest, relative, digest_stream(stream))
        if stamp_of(os.fstat(stream.fileno())) != stamp:
            raise _changed(relative)
    return stamp


def _changed(relative: str) -> IntegrityError:
    return IntegrityError(
        f"{relative} was changed while the deployment was being opened: open it again when nobody writes to it"
    )


def read_verified(folder: Path, manifest: Manifest, relative: str) -> bytes:
    """Read one file and verify the returned bytes; raises ``IntegrityError``."""
    path = locate(folder, relative)
    with reading(path), open_regular(path) as stream:
        check_size(manifest, relative, os.fstat(stream.fileno()).st_size)
        data = stream.readall()
    _check_digest(manifest, relative, digest_bytes(data))
    return data


def read_graph(folder: Path, manifest: Manifest, relative: str) -> bytes:
    """Read the ONNX graph of a task, or a shared adapter graph: one that refers to no file.

    Raises:
        IntegrityError: as ``read_verified`` does.
        GraphError: it refers to a file, or is no graph.
    """
    data = read_verified(folder, manifest, relative)
    check_graph_files(relative, data, ())
    return data


def map_verified(folder: Path, manifest: Manifest, relative: str) -> Bytes:
    """Map one file into memory and verify the mapped bytes; raises ``IntegrityError``."""
    path = locate(folder, relative)
    with reading(path):
        data = map_file(path)
    check_size(manifest, relative, data.nbytes)
    _check_digest(manifest, relative, digest_bytes(data.data))
    return data


def check_size(manifest: Manifest, relative: str, size_bytes: int) -> None:
    """Compare a file's size with the recorded one; raises ``IntegrityError``."""
    expected = manifest.files[relative].size_bytes
    if size_bytes != expected:
        raise IntegrityError(
            f"{relative} has {size_bytes} bytes, the manifest says {expected}: it was truncated or altered; "
            "export it again or restore it from a good copy"
        )


def _check_digest(manifest: Manifest, relative: str, digest: str) -> None:
    expected = manifest.files[relative].sha256
    if digest != expected:
        raise IntegrityError(
            f"{relative} has digest {digest}, the manifest says {expected}: it was altered; "
            "export it again or restore it from a good copy"
        )
