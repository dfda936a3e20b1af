"""A folder or a file that somebody swaps for a link between the check and the use is not gone through."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_models import FAMILIES

from adalink.export import deployment_paths
from adalink.export import writer as writers
from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.export.deployment_lock import LOCK_FILE
from adalink.export.writer import STAGING_FOLDER, open_writer, remove_task
from adalink.runtime.errors import DeploymentError
from adalink.runtime.storage.manifest import MANIFEST_FILE
from adalink.runtime.storage.manifest_io import read_manifest


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment with the task ``topics``, and beside it an adapter."""
    root = tmp_path_factory.mktemp("pristine")
    fingerprint = export_base(FAMILIES["llama"](), root / "deployment").base.fingerprint
    settings = {"rank": 4, "activation": "gelu", "bias": True, "scope": "all"}
    write_adapter(root / "adapter", random_adapter(fingerprint, 48, 0, **settings))
    export_adapter(root / "adapter", root / "deployment", name="topics")
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "root"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def swap(place: Path) -> Path:
    """Put a link in the place of a file or folder; it leads to a copy outside, which is returned."""
    outside = place.parent.parent / f"outside-{place.name}"
    place.rename(place.with_name("aside"))
    aside = place.with_name("aside")
    shutil.copytree(aside, outside) if aside.is_dir() else shutil.copy(aside, outside)
    place.symlink_to(outside)
    return outside


def after(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, act: Callable[[], object]) -> None:
    """Do something once, just after the first call of a function."""
    real, left = getattr(module, name), [act]

    def call(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        while left:
            left.pop()()
        return found

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("place", ["tasks", STAGING_FOLDER])
def test_folder_that_is_swapped_after_the_last_check(root: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    folder, outside = root / "deployment", []
    old = (folder / MANIFEST_FILE).read_bytes()
    after(monkeypatch, writers, "_check_free", lambda: outside.append((swap(folder / place), contents(folder / place))))
    with pytest.raises(DeploymentError, match=rf"{place} is a link to .*outside-{place}: a deployment is changed only"):
        export_adapter(root / "adapter", folder, name="second")
    ((target, before),) = outside
    assert contents(target) == before
    assert (folder / MANIFEST_FILE).read_bytes() == old


def test_folder_that_is_swapped_while_it_is_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening of the folder and the move: the file comes into the folder that was opened."""
    folder, outside = root / "deployment", []
    real = deployment_paths.os.replace

    def late(*paths: Any, **options: Any) -> None:
        if not outside:
            outside.append((swap(folder / "tasks"), contents(folder / "tasks")))
        real(*paths, **options)

    monkeypatch.setattr(deployment_paths.os, "replace", late)
    with pytest.raises(DeploymentError, match="tasks is a link to"):
        export_adapter(root / "adapter", folder, name="second")
    monkeypatch.undo()
    ((target, before),) = outside
    assert contents(target) == before
    assert any((folder / "aside" / "second").iterdir())


def test_file_that_is_removed_below_a_swapped_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is swapped while it is open; the file that was looked at is removed, not the one outside."""
    folder, outside = root / "deployment", []
    real = deployment_paths.os.stat

    def late(path: Any, **options: Any) -> Any:
        found = real(path, **options)
        if path == "adapter.onnx" and not outside:
            outside.append((swap(folder / "tasks"), contents(folder / "tasks")))
        return found

    monkeypatch.setattr(deployment_paths.os, "stat", late)
    remove_task(folder, "topics")
    monkeypatch.undo()
    ((target, before),) = outside
    assert contents(target) == before
    assert "topics/adapter.onnx" in before
    assert not (folder / "aside" / "topics" / "adapter.onnx").exists()


def test_manifest_that_is_swapped_after_the_last_check(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be that of another deployment, whose files are not these."""
    folder = root / "deployment"
    real, calls = writers._refuse_links, []

    def late(path: Path) -> None:
        real(path)
        calls.append(path)
        if len(calls) == 2:
            swap(path / MANIFEST_FILE)

    monkeypatch.setattr(writers, "_refuse_links", late)
    with pytest.raises(DeploymentError, match=r"cannot read manifest\.json: .*symbolic link"):
        remove_task(folder, "topics")
    assert "topics" in read_manifest(folder).tasks
    assert (folder / "tasks" / "topics").is_dir()


def test_lock_that_is_swapped_after_the_check(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "deployment"
    after(monkeypatch, writers, "_refuse_links", lambda: swap(folder / LOCK_FILE).write_text("a user's file"))
    with pytest.raises(DeploymentError, match=r"\.lock is a link or a folder, expected a file"):
        remove_task(folder, "topics")
    assert (root / "outside-.lock").read_text() == "a user's file"


def test_link_among_what_is_staged(root: Path, tmp_path: Path) -> None:
    """Its target would keep its place and get another mode."""
    (tmp_path / "mine").write_text("a user's file")
    (tmp_path / "mine").chmod(0o600)
    with open_writer(root / "deployment") as writer:
        writer.stage("tasks/second/adapter.onnx").symlink_to(tmp_path / "mine")
        with pytest.raises(DeploymentError, match="is a link to"):
            writer.commit(writer.manifest)
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600


def test_staged_file_that_is_swapped_after_it_was_hashed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "deployment"
    (tmp_path / "mine").write_text("a user's file")
    (tmp_path / "mine").chmod(0o600)

    def exchange() -> None:
        path = next((folder / STAGING_FOLDER).rglob("adapter.onnx"))
        path.unlink()
        path.symlink_to(tmp_path / "mine")

    after(monkeypatch, writers, "write_through", exchange)
    with pytest.raises(DeploymentError, match=r"adapter\.onnx is a link to"):
        export_adapter(root / "adapter", folder, name="second")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
    assert "second" not in read_manifest(folder).tasks


def test_nobody_else_may_write_to_what_is_staged(root: Path) -> None:
    with open_writer(root / "deployment"):
        assert (root / "deployment" / STAGING_FOLDER).stat().st_mode & 0o077 == 0
