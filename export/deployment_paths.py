"""Changes below a deployment folder that go through no link, whoever swaps a folder for one meanwhile.

A path that was checked and is then used may lead elsewhere by then. Here each folder of a path is opened from the one
above it, without following a link, and files are moved and removed in the folder that was opened.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from adalink.runtime.errors import DeploymentError
from adalink.runtime.storage.digest import digest_stream

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def parents_of(path: str) -> Iterator[str]:
    """Every folder that a relative path lies in, the innermost first."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def link_error(path: Path) -> DeploymentError:
    """The error of a link, or of a file, in the place of a deployment's folder or file."""
    what = f"a link to {path.readlink()}" if path.is_symlink() else "not what it was"
    return DeploymentError(
        f"{path} is {what}: a deployment is changed only where its files lie themselves; replace the link by what it "
        "leads to"
    )


@contextmanager
def open_folder(root: Path, relative: str, *, create: bool = False) -> Iterator[int]:
    """Open a folder below ``root``; ``root`` itself may be a link.

    Args:
        root: the deployment.
        relative: the folder's path; empty for the deployment itself.
        create: whether to make folders that are missing.

    Raises:
        DeploymentError: a part of the path is a link, or no folder.
        OSError: it is missing, or the disk refuses.
    """
    descriptor = os.open(root, _FOLDER)
    path = root
    try:
        for part in relative.split("/") if relative else ():
            path /= part
            if create:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptor)
            try:
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise link_error(path) from error
                raise
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def move_file(root: Path, source: str, target: str) -> None:
    """Rename a file below ``root`` to another path, whose folders are made; raises as ``open_folder`` does."""
    source_folder, _, source_name = source.rpartition("/")
    target_folder, _, target_name = target.rpartition("/")
    with open_folder(root, source_folder) as left, open_folder(root, target_folder, create=True) as right:
        os.replace(source_name, target_name, src_dir_fd=left, dst_dir_fd=right)


def set_mode(path: Path, mode: int) -> None:
    """Set the mode of a file; raises ``DeploymentError`` for a link."""
    try:
        descriptor = os.open(path, _FILE)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise link_error(path) from error
        raise
    try:
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def remove_file(root: Path, relative: str, digest: str) -> None:
    """Remove a file, and the folders that it leaves empty; leaves what is a link, missing, or another file.

    Args:
        root: the deployment.
        relative: the file's path.
        digest: the digest that it must have; empty for any.

    Raises:
        OSError: the disk refuses.
    """
    name = relative.rpartition("/")[2]
    with suppress(FileNotFoundError, DeploymentError), open_folder(root, relative.rpartition("/")[0]) as folder:
        is_file = stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
        if is_file and (not digest or _digest(name, folder) == digest):
            os.unlink(name, dir_fd=folder)
    for parent in parents_of(relative):
        above, _, inner = parent.rpartition("/")
        with suppress(OSError, DeploymentError), open_folder(root, above) as folder:  # it may hold other files
            os.rmdir(inner, dir_fd=folder)


def _digest(name: str, folder: int) -> str:
    with FileIO(os.open(name, _FILE, dir_fd=folder), "rb") as stream:
        return digest_stream(stream)
