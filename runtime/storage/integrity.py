"""Integrity: a deployment's files are verified against its manifest before use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adalink.runtime.errors import IntegrityError
from adalink.runtime.storage.digest import digest_bytes, digest_file
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.mmap import Bytes, map_file


def locate(folder: Path, relative: str) -> Path:
    """Path of a deployment's file; raises ``IntegrityError`` if it is missing or a link leads outside."""
    root = folder.resolve()
    path = root / relative
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise IntegrityError(
            f"{path}: the manifest lists this file, but it cannot be found: export it again, or reopen the "
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
            f"{path} cannot be read: {error.strerror}; make it readable, export it again, or reopen the deployment if "
            "another process has just replaced it"
        ) from error


def verify_files(
    folder: Path,
    manifest: Manifest,
    paths: Iterable[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Verify files against their recorded size and SHA-256.

    Args:
        folder: the deployment.
        manifest: its manifest.
        paths: the files; by default all files of the manifest.
        progress: called with each path before it is read.

    Raises:
        IntegrityError: a file is missing, unreadable, truncated, altered, or a link out of the deployment.
    """
    for relative in sorted(manifest.files) if paths is None else paths:
        if progress is not None:
            progress(relative)
        path = locate(folder, relative)
        with reading(path):
            check_size(manifest, relative, path.stat().st_size)
            _check_digest(manifest, relative, digest_file(path))


def read_verified(folder: Path, manifest: Manifest, relative: str) -> bytes:
    """Read one file and verify the returned bytes; raises ``IntegrityError``."""
    path = locate(folder, relative)
    with reading(path):
        check_size(manifest, relative, path.stat().st_size)
        data = path.read_bytes()
    _check_digest(manifest, relative, digest_bytes(data))
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
