"""Atomic changes to a deployment folder: stage files, rename them into place, then commit the manifest.

The manifest is the point of commit. New files get paths that the current manifest does not use. Until the new manifest
is renamed over the old one, the old deployment is whole; afterwards the new one is. What a writer leaves behind is in
the lock's journal, and the next writer removes it: these files and no others. See
docs/decisions/0002-atomic-deployments.md.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import msgspec

from adalink.export.deployment_lock import LOCK_FILE, DeploymentLock, JournalEntry, hold_lock, read_own_lock
from adalink.export.deployment_paths import link_error, move_file, parents_of, remove_file, set_mode
from adalink.export.table_file import own_name, takes_table_along, write_out
from adalink.runtime.errors import DeploymentError, WriteError
from adalink.runtime.near_names import did_you_mean
from adalink.runtime.storage.atomic import sync, write_through
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.known_tasks import check_tasks
from adalink.runtime.storage.manifest import MANIFEST_FILE, SCHEMA_VERSION, FileRecord, Manifest
from adalink.runtime.storage.manifest_io import decode_manifest, encode_manifest, read_manifest

STAGING_FOLDER = ".staging"
_OWNED_FOLDERS = ("base", "engines", "tasks")
_SEQUENTIAL_FLUSHES = 32
_FLUSHES_AT_ONCE = 32


class DeploymentWriter:
    """One exclusive change to a deployment; made by ``open_writer``.

    Attributes:
        folder: the deployment.
        current: the manifest before the change; ``None`` for a new deployment.
    """

    def __init__(self, folder: Path, current: Manifest | None, lock: DeploymentLock) -> None:
        self.folder = folder
        self.current = current
        self._lock = lock
        self._staging = folder / STAGING_FOLDER
        paths = current.paths_in_use() if current else set()
        # Case-folded: some file systems ignore case.
        self._used_folders = {parent.casefold() for path in paths for parent in parents_of(path)}

    @property
    def manifest(self) -> Manifest:
        """The manifest before the change; raises ``DeploymentError`` for a new deployment."""
        if self.current is None:
            raise DeploymentError(f"{self.folder} is no deployment yet: export a base into it first")
        return self.current

    def fresh_folder(self, relative: str) -> str:
        """An unused folder: ``relative``, or ``relative.2`` and so on; each is returned once.

        A folder that lies there already counts as used, whoever made it.
        """
        candidate, number = relative, 1
        while candidate.casefold() in self._used_folders or os.path.lexists(self.folder / candidate):
            number += 1
            candidate = f"{relative}.{number}"
        self._used_folders.add(candidate.casefold())
        return candidate

    def stage(self, relative: str) -> Path:
        """The path to write the future file ``relative`` to; its folder exists."""
        path = self._staging / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, manifest: Manifest) -> Manifest:
        """Make ``manifest`` and every staged file the deployment; returns the manifest as it is on disk.

        ``manifest.files`` is filled in here: staged files are hashed, kept ones keep their record. A table that lies in
        the data of a variant which goes is written into a file of its own, so that the data go too.

        Raises:
            DeploymentError: something that is not the kit's lies where a file would go.
            IntegrityError: the data with the table are missing or altered.
        """
        if self.current is not None and takes_table_along(self.current, manifest):
            relative = f"{self.fresh_folder('base/table')}/{own_name(self.current.base)}"
            base = write_out(self.folder, self.current, relative, self.stage(relative))
            manifest = msgspec.structs.replace(manifest, base=base)
        staged = {path.relative_to(self._staging).as_posix(): path for path in _files_below(self._staging)}
        kept = dict(self.current.files) if self.current else {}
        if clash := sorted(staged.keys() & kept.keys()):
            raise AssertionError(f"{clash[0]} is in use by the current manifest: take a fresh folder")
        records = {
            relative: FileRecord(sha256=digest_file(path), size_bytes=path.stat().st_size)
            for relative, path in staged.items()
        }
        used = manifest.paths_in_use()
        files = {path: record for path, record in (kept | records).items() if path in used}
        manifest = msgspec.structs.replace(
            manifest, schema_version=SCHEMA_VERSION, kit_version=version("adalink-kit"), files=files
        )
        data = encode_manifest(manifest)
        manifest = decode_manifest(data)
        pending = self._staging / MANIFEST_FILE
        write_through(pending, data)
        # Some libraries write files that only their owner may read; a deployment's have the mode of any new file.
        mode = stat.S_IMODE(pending.stat().st_mode)
        for path in staged.values():
            if path.stat().st_nlink == 1:  # a linked file is the user's own
                set_mode(path, mode)
        _sync_all(staged.values())
        for relative in staged:
            _check_free(self.folder, relative)
        self._lock.record(JournalEntry(relative, record.sha256) for relative, record in records.items())
        self._lock.record(JournalEntry(relative) for relative in sorted(kept.keys() - files.keys()))
        for relative in staged:
            move_file(self.folder, f"{STAGING_FOLDER}/{relative}", relative)
        # A new folder is on the disk once its parent is flushed.
        folders = {self.folder / parent for relative in staged for parent in parents_of(relative)}
        _sync_all(sorted({self.folder, *folders}))
        move_file(self.folder, f"{STAGING_FOLDER}/{MANIFEST_FILE}", MANIFEST_FILE)
        sync(self.folder)
        return manifest


@contextmanager
def open_writer(path: str | Path, *, create: bool = False) -> Iterator[DeploymentWriter]:
    """Lock a deployment for one change; leaving without ``commit`` changes nothing.

    Args:
        path: the deployment folder.
        create: whether the deployment may be new; otherwise the folder must hold a manifest.

    Raises:
        BusyError: another process holds the lock.
        DeploymentError: the folder is no deployment, or holds other things; or a link leads out of it.
        WriteError: the disk is full or read-only.
    """
    folder = Path(path)
    _refuse_links(folder)
    try:
        if create:
            check_new(folder)
            folder.mkdir(parents=True, exist_ok=True)
        current = read_manifest(folder) if not create or (folder / MANIFEST_FILE).exists() else None
        with hold_lock(folder, has_manifest=current is not None) as lock:
            _refuse_links(folder)
            # Read again: the manifest may have changed before the lock was held.
            current = _read_own(folder) if current or (folder / MANIFEST_FILE).exists() else None
            staging = _clear_staging(folder, lock)
            _remove_unused(folder, current, lock)
            try:
                lock.record([JournalEntry(STAGING_FOLDER)])
                staging.mkdir(mode=0o700)  # nobody else puts a link into it
                yield DeploymentWriter(folder, current, lock)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
                # The manifest on the disk decides, not this process's view of it. Files that cannot be removed do no
                # harm: nothing refers to them, and the next writer tries again.
                with suppress(OSError):
                    _remove_unused(folder, _read_own(folder) if (folder / MANIFEST_FILE).exists() else None, lock)
                    lock.clear()
    except OSError as error:
        where = error.filename or folder
        raise WriteError(
            f"deployment {folder}: cannot write {where}: {error.strerror or error}; the deployment is as it was. "
            "Free space or choose a writable folder, then run the command again"
        ) from error


def check_new(folder: Path) -> None:
    """Check that a folder is a deployment, or can become one: it is empty, or an export was interrupted there.

    Raises:
        DeploymentError: it is a file, or holds other things.
    """
    if folder.exists() and not folder.is_dir():
        raise DeploymentError(f"{folder} is a file: choose a folder for the deployment")
    if not folder.is_dir() or (folder / MANIFEST_FILE).exists():
        return
    lock = read_own_lock(folder)
    others = sorted(entry.name for entry in folder.iterdir() if lock is None or entry.name != LOCK_FILE)
    if others and not lock:
        raise DeploymentError(
            f"{folder} holds {others[0]!r} and no {MANIFEST_FILE}, and nothing says that an export of this kit was "
            "interrupted here: it is not a deployment; choose an empty folder"
        )


def _refuse_links(folder: Path) -> None:
    """What a writer writes to lies in the folder itself; raises ``DeploymentError`` for a link. The folder may be one.

    This finds links that lie there, and says so before any work is done. A link that is put there later is found where
    it would be gone through: see ``adalink.export.deployment_paths``.
    """
    for name in (LOCK_FILE, STAGING_FOLDER, MANIFEST_FILE, *_OWNED_FOLDERS):
        _refuse_link(folder / name)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise link_error(path)


def _read_own(folder: Path) -> Manifest:
    """The manifest that lies in the folder itself; raises as ``read_manifest`` does."""
    return read_manifest(folder, follow_links=False)


def _check_free(folder: Path, relative: str) -> None:
    """Check that a new file overwrites nothing and goes through no link; raises ``DeploymentError``."""
    for parent in parents_of(relative):
        _refuse_link(folder / parent)
    if os.path.lexists(folder / relative):
        raise DeploymentError(
            f"{folder / relative} is not a file of this kit, and a new file would replace it: move it away"
        )


def _clear_staging(folder: Path, lock: DeploymentLock) -> Path:
    """Remove what a killed writer has staged; raises ``DeploymentError`` for a folder that no writer made."""
    staging = folder / STAGING_FOLDER
    if os.path.lexists(staging):
        # Kits before 0.3.0 kept no journal; beside their lock and manifest the folder is theirs.
        if not lock.is_legacy and all(entry.path != STAGING_FOLDER for entry in lock.journal):
            raise DeploymentError(f"{staging} was made by no export of this kit: move it away")
        shutil.rmtree(staging, ignore_errors=True)
    return staging


def _files_below(folder: Path) -> list[Path]:
    """Files below a folder; raises ``DeploymentError`` for a link among them."""
    paths = sorted(folder.rglob("*")) if folder.is_dir() else []
    for path in paths:
        _refuse_link(path)
    return [path for path in paths if path.is_file()]


def _remove_unused(folder: Path, manifest: Manifest | None, lock: DeploymentLock) -> None:
    """Remove the journal's files that the manifest does not refer to, and their folders where these are empty.

    A file of a commit that was not finished is the kit's only if it has the recorded bytes.
    """
    used = set(manifest.files) if manifest else set()
    for entry in lock.journal:
        parts = entry.path.split("/")
        if entry.path in used or len(parts) < 2 or parts[0] not in _OWNED_FOLDERS or {"", ".", ".."} & set(parts):
            continue
        remove_file(folder, entry.path, entry.sha256)


def _sync_all(paths: Collection[Path]) -> None:
    """Flush files or folders, many at once: a disk flushes many in little more time than one."""
    if len(paths) <= _SEQUENTIAL_FLUSHES:
        for path in paths:
            sync(path)
        return
    with ThreadPoolExecutor(_FLUSHES_AT_ONCE) as pool:
        for _ in pool.map(sync, paths):  # raises the first error
            pass


def remove_task(path: str | Path, name: str) -> Manifest:
    """Remove a task from a deployment; files under ``base/`` and ``engines/`` stay as they are.

    Raises:
        UnknownTaskError: no task of that name is deployed.
    """
    with open_writer(path) as writer:
        check_tasks([name], writer.manifest.tasks)
        tasks = {key: task for key, task in writer.manifest.tasks.items() if key != name}
        return writer.commit(msgspec.structs.replace(writer.manifest, tasks=tasks))


def remove_variant(path: str | Path, name: str) -> Manifest:
    """Remove one variant of the base from a deployment, a graph or a compiled engine; tasks stay.

    Raises:
        DeploymentError: there is no such variant, or it is the only one.
    """
    with open_writer(path) as writer:
        known = ", ".join(sorted(writer.manifest.variants))
        if name not in writer.manifest.variants:
            raise DeploymentError(
                f"variant {name!r} is not in {path}: it has {known}{did_you_mean(name, writer.manifest.variants)}"
            )
        variants = {key: variant for key, variant in writer.manifest.variants.items() if key != name}
        if not variants:
            raise DeploymentError(f"variant {name!r} is the only one of {path}: export another before you remove it")
        return writer.commit(msgspec.structs.replace(writer.manifest, variants=variants))
