"""A writer removes and replaces the kit's files alone, whatever else lies in the folder, and follows no links."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from adalink.export.adapter.export import export_adapter
from adalink.export.deployment_lock import LOCK_FILE
from adalink.export.writer import STAGING_FOLDER, open_writer, remove_task
from adalink.runtime.errors import DeploymentError
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest import MANIFEST_FILE, Manifest
from adalink.runtime.storage.manifest_io import read_manifest

FOREIGN = {
    "README.md": "notes",
    "base/notes.txt": "a user's notes",
    "base/onnxruntime-cpu/model.onnx": "a user's model",
    "engines/mine/engine.plan": "a user's plan",
    "tasks/todo/list.txt": "a user's list",
}
NAMES = (LOCK_FILE, STAGING_FOLDER, MANIFEST_FILE, "base", "engines", "tasks")


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, links as what they say."""
    return {
        path.relative_to(folder).as_posix(): os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or path.is_file()) and path.name != LOCK_FILE
    }


def plant(folder: Path) -> dict[str, bytes]:
    """Put a user's own files into a folder."""
    for name, text in FOREIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_text(text)
    return files(folder)


def publish(source: Path, out: Path) -> Manifest:
    """A new deployment with the files of another, as ``export_base`` writes one."""
    manifest = read_manifest(source)
    with open_writer(out, create=True) as writer:
        for name in manifest.files:
            shutil.copyfile(source / name, writer.stage(name))
        return writer.commit(manifest)


@pytest.mark.parametrize("lock", ["", "mine", "123", "adalink-kit", "{}"])
def test_folder_with_some_lock_file_is_no_interrupted_export(pristine: Path, tmp_path: Path, lock: str) -> None:
    """The lock of other programs has the same name."""
    folder = tmp_path / "folder"
    folder.mkdir()
    before = plant(folder)
    (folder / LOCK_FILE).write_text(lock)
    with pytest.raises(DeploymentError, match="it is not a deployment; choose an empty folder"):
        publish(pristine / "deployment", folder)
    assert files(folder) == before
    assert (folder / LOCK_FILE).read_text() == lock


def test_foreign_lock_beside_a_manifest_is_refused_and_kept(root: Path) -> None:
    folder = root / "deployment"
    (folder / LOCK_FILE).write_text("a lock of another program")
    with pytest.raises(DeploymentError, match="is not a lock of this kit"):
        remove_task(folder, "topics")
    assert (folder / LOCK_FILE).read_text() == "a lock of another program"


@pytest.mark.parametrize("lock", [None, "", "4711"])
def test_deployments_of_earlier_kits_are_written_to(root: Path, lock: str | None) -> None:
    """Their lock holds a number alone, and a copied deployment has none."""
    folder = root / "deployment"
    (folder / LOCK_FILE).unlink()
    if lock is not None:
        (folder / LOCK_FILE).write_text(lock)
    if lock == "4711":  # an earlier kit was killed here
        (folder / STAGING_FOLDER).mkdir()
        (folder / STAGING_FOLDER / "x").write_bytes(b"staged")
    before = plant(folder)
    remove_task(folder, "topics")
    assert export_adapter(root / "one", folder, name="topics").tasks.keys() == {"topics"}
    assert {name: files(folder)[name] for name in FOREIGN} == {name: before[name] for name in FOREIGN}
    assert not (folder / STAGING_FOLDER).exists()


def test_writers_leave_foreign_files_alone(root: Path) -> None:
    folder = root / "deployment"
    before = plant(folder)
    (folder / "tasks" / "topics.2").mkdir()
    (folder / "tasks" / "topics.2" / "draft").write_text("kept")
    manifest = export_adapter(root / "one", folder, name="topics", replace=True)
    assert manifest.tasks["topics"].graph == "tasks/topics.3/adapter.onnx"
    remove_task(folder, "topics")
    kept = {name: data for name, data in before.items() if not name.startswith("tasks/topics")}
    kept |= {"tasks/topics.2/draft": b"kept", MANIFEST_FILE: (folder / MANIFEST_FILE).read_bytes()}
    assert files(folder) == kept


def test_file_in_the_way_of_a_new_one_is_not_replaced(root: Path) -> None:
    folder = root / "deployment"
    with open_writer(folder) as writer:
        relative = f"{writer.fresh_folder('tasks/new')}/adapter.onnx"
        writer.stage(relative).write_bytes(b"new")
        (folder / "tasks" / "new").mkdir()
        (folder / relative).write_bytes(b"foreign")
        with pytest.raises(DeploymentError, match="is not a file of this kit"):
            writer.commit(writer.manifest)
    assert (folder / relative).read_bytes() == b"foreign"
    verify_files(folder, read_manifest(folder))


def test_staging_folder_of_somebody_else_is_kept(root: Path) -> None:
    folder = root / "deployment"
    (folder / STAGING_FOLDER).mkdir()
    (folder / STAGING_FOLDER / "draft").write_text("mine")
    with pytest.raises(DeploymentError, match="was made by no export of this kit"):
        remove_task(folder, "topics")
    assert (folder / STAGING_FOLDER / "draft").read_text() == "mine"


def kill_at(step: int, change: Callable[[], object]) -> bool:
    """Run a change in a child that dies before its n-th call to the disk; whether it died."""
    child = os.fork()
    if child == 0:
        calls = 0

        def watched(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "pwrite", "ftruncate"):
            setattr(os, name, watched(getattr(os, name)))
        change()
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def test_first_export_killed_anywhere_can_be_repeated_and_keeps_foreign_files(pristine: Path, tmp_path: Path) -> None:
    """What a user puts there between the two is no file of the kit, even in the place of one."""
    source, step, died = pristine / "deployment", 0, True
    while died:
        step += 1
        folder = tmp_path / str(step)
        died = kill_at(step, lambda folder=folder: publish(source, folder))
        if (folder / MANIFEST_FILE).exists():
            verify_files(folder, read_manifest(folder))
            continue
        (folder / "base").mkdir(parents=True, exist_ok=True)
        (folder / "base" / "notes.txt").write_text("mine")
        if not (folder / LOCK_FILE).exists() or not (folder / LOCK_FILE).stat().st_size:
            with pytest.raises(DeploymentError, match="choose an empty folder"):
                publish(source, folder)
            continue
        manifest = publish(source, folder)
        verify_files(folder, manifest)
        assert files(folder).keys() == {*manifest.files, MANIFEST_FILE, "base/notes.txt"}
    assert step > 20


def test_file_of_an_unfinished_commit_is_removed_by_its_bytes(pristine: Path, tmp_path: Path) -> None:
    """After a kill somebody writes another file to the place of one of the kit's."""
    source, folder = pristine / "deployment", tmp_path / "new"
    step, path = 0, folder / read_manifest(source).base.embeddings
    while not path.exists() or (folder / MANIFEST_FILE).exists():
        step += 1
        shutil.rmtree(folder, ignore_errors=True)
        assert kill_at(step, lambda: publish(source, folder))
    path.write_bytes(b"mine")
    with pytest.raises(DeploymentError, match=r"model\.onnx\.data is not a file of this kit"):
        publish(source, folder)
    assert path.read_bytes() == b"mine"
    path.unlink()
    verify_files(folder, publish(source, folder))


@pytest.mark.parametrize("path", ["../outside", "base/../../outside", "/etc/hostname", "tasks//x", "README.md"])
def test_journal_reaches_nothing_outside(root: Path, path: str) -> None:
    """Planted: a deployment whose lock somebody else has written."""
    folder = root / "deployment"
    remove_task(folder, "topics")
    for name in ("outside", "deployment/README.md"):
        (root / name).write_text("kept")
    with (folder / LOCK_FILE).open("ab") as stream:
        stream.write(b'{"path":"%s","sha256":""}\n{"path":"\xff"}\nnoise\n{"path":"base/em' % path.encode())
    export_adapter(root / "one", folder, name="topics")
    assert (root / "outside").read_text() == (folder / "README.md").read_text() == "kept"
    verify_files(folder, read_manifest(folder))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_file", [True, False])
def test_link_out_of_the_deployment_is_refused_by_name(root: Path, name: str, *, is_file: bool) -> None:
    folder, outside = root / "deployment", root / "outside"
    place = folder / name
    if place.exists():
        place.rename(outside)
    elif is_file:
        outside.write_text("kept")
    else:
        outside.mkdir()
    place.symlink_to(outside)
    before = files(root)
    with pytest.raises(DeploymentError, match=rf"{name} is a link to"):
        export_adapter(root / "one", folder, name="second")
    assert files(root) == before


def test_link_below_a_folder_is_not_gone_through(root: Path) -> None:
    """A task's folder that leads elsewhere is neither emptied nor written to."""
    folder, outside = root / "deployment", root / "outside"
    (folder / "tasks" / "topics").rename(outside)
    (folder / "tasks" / "topics").symlink_to(outside)
    before = files(outside)
    manifest = export_adapter(root / "one", folder, name="topics", replace=True)
    assert manifest.tasks["topics"].graph.startswith("tasks/topics.2/")
    assert files(outside) == before


def test_deployment_may_itself_be_a_link(root: Path) -> None:
    link = root / "link"
    link.symlink_to(root / "deployment")
    assert "second" in export_adapter(root / "one", link, name="second").tasks
    assert link.is_symlink()


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_lock_that_is_no_file_is_refused(root: Path, make: Callable[[Path], None]) -> None:
    lock = root / "deployment" / LOCK_FILE
    lock.unlink()
    make(lock)
    with pytest.raises(DeploymentError, match="move it away"):
        remove_task(root / "deployment", "topics")
