"""What an engine loads is what was verified: files that are exchanged in between are noticed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.runtime import let_files_settle

from adalink.export.writer import remove_task
from adalink.runtime import Deployment
from adalink.runtime.errors import AdapterError, DeploymentError, IntegrityError
from adalink.runtime.model_runner import ModelRunner
from adalink.runtime.ort.backend import OnnxRuntimeBackend
from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest_io import read_manifest


@pytest.fixture(params=["just written", "older"])
def copy(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(llama.folder, tmp_path / "copy"))
    if request.param == "older":
        let_files_settle(monkeypatch)
        Deployment.open(folder).close()  # its digests are known
    return folder


def swapped(path: Path) -> None:
    """Another file of the same name, size and modification time."""
    before, other = path.stat(), path.with_name("other")
    shutil.copy(path, other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def swapped_back(path: Path) -> None:
    """Another file for a moment, then the first one again: its bytes are right whenever one looks."""
    kept = path.with_name("kept")
    path.rename(kept)
    shutil.copy(kept, path)
    kept.replace(path)


def rewritten(path: Path) -> None:
    """Changed in place for a moment, its time stamp put back."""
    before, data = path.stat(), path.read_bytes()
    path.write_bytes(data[::-1])
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [swapped, swapped_back, rewritten])
@pytest.mark.parametrize("which", ["graph", "weights", "table"])
@pytest.mark.parametrize("full_check", [False, True])
def test_change_between_check_and_use_is_noticed(
    copy: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], which: str, *, full_check: bool
) -> None:
    manifest, closed = read_manifest(copy), []
    graph = next(iter(manifest.variants.values())).graph
    relative = {"graph": graph, "weights": f"{graph}.data", "table": manifest.base.embeddings}[which]
    opens, closes = OnnxRuntimeBackend.open_engine, ModelRunner.close

    def late(self: OnnxRuntimeBackend, *arguments: Any) -> Any:
        change(copy / relative)
        return opens(self, *arguments)

    monkeypatch.setattr(OnnxRuntimeBackend, "open_engine", late)
    monkeypatch.setattr(ModelRunner, "close", lambda self: (closed.append(self), closes(self)))
    with pytest.raises(IntegrityError, match=rf"{relative} was changed while the deployment was being opened"):
        Deployment.open(copy, full_check=full_check)
    assert len(closed) == 1
    monkeypatch.undo()
    Deployment.open(copy).close()


def test_file_that_changes_while_it_is_read_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adalink.runtime.storage import integrity

    manifest, digest = read_manifest(copy), integrity.digest_stream
    path = copy / manifest.base.embeddings

    def slow(stream: Any) -> str:
        found = digest(stream)
        rewritten(path)
        return found

    monkeypatch.setattr(integrity, "digest_stream", slow)
    with pytest.raises(IntegrityError, match="was changed while"):
        verify_files(copy, manifest, [manifest.base.embeddings])


@pytest.mark.parametrize("name", ["manifest.json", "base/onnxruntime-cpu/model.onnx.data", "base/tokenizer.json"])
def test_pipe_in_the_place_of_a_file_does_not_wait(llama: Any, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(llama.folder, tmp_path / "copy"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DeploymentError, match="not a file"):
        Deployment.open(folder, full_check=True)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_pipe_in_an_adapter_folder_does_not_wait(llama: Any, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(llama.sources / "alpha", tmp_path / "alpha"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(AdapterError, match=r"not a file|is missing"):
        read_adapter(folder)


def test_receipt_covers_loaded_tasks_and_no_others(copy: Path) -> None:
    with Deployment.open(copy) as opened:
        assert opened.receipt().task_digests == {}
        opened.load_task("alpha")
        receipt, files = opened.receipt(), opened.manifest.tasks["alpha"].files
        assert receipt.unchanged
        assert receipt.task_digests == {path: opened.manifest.files[path].sha256 for path in files}
        weights = copy / opened.manifest.tasks["alpha"].weights
        weights.write_bytes(weights.read_bytes()[::-1])
        assert not opened.receipt().unchanged
        opened.unload_task("alpha")
        assert opened.receipt().unchanged


def test_receipt_of_a_task_that_was_replaced_since_says_what_was_loaded(copy: Path) -> None:
    with Deployment.open(copy) as opened:
        opened.load_task("alpha")
        before = opened.receipt()
        remove_task(copy, "alpha")
        assert opened.receipt() == before
