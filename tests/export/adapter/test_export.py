"""Adapters enter and leave a deployment without a byte of the base being touched, and only those that belong there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers.runtime import random_adapter, reseal, write_adapter
from helpers.tiny_models import FAMILIES

from adalink.export.adapter import export as adapter_module
from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.export.writer import remove_task
from adalink.runtime.errors import (
    AdapterError,
    ContractError,
    DeploymentError,
    GraphError,
    IntegrityError,
    UnknownTaskError,
)
from adalink.runtime.storage.adapter import WEIGHTS_FILE, read_adapter
from adalink.runtime.storage.adapter_spec import ACTIVATION_KEYS
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest_io import read_manifest

SETTINGS: dict[str, Any] = {"rank": 4, "activation": "gelu", "bias": True, "scope": "all"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "deployment"
    export_base(FAMILIES["llama"](), folder, modalities=("text", "image"))
    return folder


@pytest.fixture
def deployment(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "deployment")


def make(folder: Path, deployment: Path, seed: int = 0, **changes: Any) -> Path:
    base = read_manifest(deployment).base
    wanted = {"fingerprint": base.fingerprint, "hidden_size": base.hidden_size} | SETTINGS | changes
    return write_adapter(folder, random_adapter(seed=seed, **wanted))


def state(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Digest, modification time and inode of every file under ``base/``."""
    return {
        str(path.relative_to(folder)): (digest_file(path), path.stat().st_mtime_ns, path.stat().st_ino)
        for path in sorted((folder / "base").rglob("*"))
        if path.is_file()
    }


def test_adding_replacing_and_removing_touch_no_byte_of_the_base(deployment: Path, tmp_path: Path) -> None:
    before = state(deployment)
    assert len(before) == 2 + len(ACTIVATION_KEYS)
    first = make(tmp_path / "topics", deployment, seed=1)
    manifest = export_adapter(first, deployment)
    assert manifest.tasks.keys() == {"topics"}
    assert manifest.tasks["topics"].adapter_digest == read_adapter(first).digest
    second = make(tmp_path / "second", deployment, seed=2)
    export_adapter(second, deployment, name="topics", replace=True)
    replaced = read_manifest(deployment)
    assert replaced.tasks["topics"].adapter_digest == read_adapter(second).digest
    verify_files(deployment, replaced)
    assert [path.name for path in (deployment / "tasks").iterdir()] == ["topics.2"]
    assert replaced.tasks["topics"].graph == "tasks/topics.2/adapter.onnx"
    assert remove_task(deployment, "topics").tasks == {}
    assert list(deployment.glob("tasks/*/*")) == []
    assert state(deployment) == before


def test_shipped_files_are_the_adapter_and_its_graph(deployment: Path, tmp_path: Path) -> None:
    source = make(tmp_path / "topics", deployment, seed=3)
    task = export_adapter(source, deployment).tasks["topics"]
    folder = (deployment / task.graph).parent
    assert read_adapter(folder).digest == read_adapter(source).digest == task.adapter_digest
    graph = onnx.load(deployment / task.graph)
    assert {entry.key: entry.value for entry in graph.metadata_props}["adapter_digest"] == task.adapter_digest
    assert (task.rank, task.activation, task.scope, task.modalities) == (4, "gelu", "all", ("text",))


def test_taken_name_needs_replace_and_leaves_the_old_task(deployment: Path, tmp_path: Path) -> None:
    export_adapter(make(tmp_path / "topics", deployment, seed=1), deployment)
    before = read_manifest(deployment)
    with pytest.raises(DeploymentError, match=r"already has a task 'topics'.*--replace"):
        export_adapter(make(tmp_path / "other", deployment, seed=2), deployment, name="topics")
    assert read_manifest(deployment) == before


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "x" * 65, "topics.2"])
def test_unusable_names_are_refused(name: str, deployment: Path, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="expected 1 to 64 letters"):
        export_adapter(make(tmp_path / "topics", deployment), deployment, name=name)


def test_adapter_of_another_base_names_both_fingerprints(deployment: Path, tmp_path: Path) -> None:
    foreign = "sha256:" + "ab" * 32
    own = read_manifest(deployment).base.fingerprint
    with pytest.raises(ContractError) as caught:
        export_adapter(make(tmp_path / "topics", deployment, fingerprint=foreign), deployment)
    assert foreign in str(caught.value)
    assert own in str(caught.value)
    assert read_manifest(deployment).tasks == {}


def test_adapter_of_another_width_is_refused(deployment: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"hidden_size 32, .* has 48"):
        export_adapter(make(tmp_path / "topics", deployment, hidden_size=32), deployment)


def test_modality_that_the_base_does_not_take_is_refused(deployment: Path, tmp_path: Path) -> None:
    known = export_adapter(make(tmp_path / "both", deployment, modalities=("image", "text")), deployment)
    assert known.tasks["both"].modalities == ("image", "text")
    with pytest.raises(ContractError, match=r"modality 'audio', .* was exported for text, image: .*--modality audio"):
        export_adapter(make(tmp_path / "heard", deployment, modalities=("text", "audio")), deployment)


def test_other_dtype_than_the_base_is_refused(deployment: Path, tmp_path: Path) -> None:
    source = make(tmp_path / "topics", deployment)
    with pytest.raises(ContractError, match=r"float16 was asked for, .* takes float32"):
        export_adapter(source, deployment, dtype="float16")
    assert "topics" in export_adapter(source, deployment, dtype="float32").tasks


def test_damaged_adapter_is_refused_before_anything_is_written(deployment: Path, tmp_path: Path) -> None:
    source = make(tmp_path / "topics", deployment)
    data = (source / WEIGHTS_FILE).read_bytes()
    (source / WEIGHTS_FILE).write_bytes(data[:-1])
    with pytest.raises(AdapterError, match="not a complete safetensors file"):
        export_adapter(source, deployment)
    assert not (deployment / "tasks").exists()


def test_damaged_embeddings_are_found_before_a_task_is_added(deployment: Path, tmp_path: Path) -> None:
    path = deployment / read_manifest(deployment).base.embeddings
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.onnx\.data has digest"):
        export_adapter(make(tmp_path / "topics", deployment), deployment)


def test_folder_without_a_deployment_is_refused(deployment: Path, tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="does not exist: make one with 'adalink export base"):
        export_adapter(make(tmp_path / "topics", deployment), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_graph_that_computes_something_else_is_not_registered(
    deployment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder is given a fault, a weight changed by 1 %: the run before registering must stop it."""
    build = adapter_module.build_task_graph

    def faulty(*arguments: Any) -> onnx.ModelProto:
        model = build(*arguments)
        tensor = next(t for t in model.graph.initializer if t.name == "text.up.weight")
        weight = onnx.numpy_helper.to_array(tensor).copy()
        weight.flat[np.abs(weight).argmax()] *= np.float32(1.01)
        tensor.CopyFrom(onnx.numpy_helper.from_array(weight, tensor.name))
        return model

    monkeypatch.setattr(adapter_module, "build_task_graph", faulty)
    with pytest.raises(GraphError, match="does not compute the adapter"):
        export_adapter(make(tmp_path / "topics", deployment), deployment)
    assert read_manifest(deployment).tasks == {}
    assert not (deployment / "tasks").exists()


def test_bank_that_computes_something_else_stops_the_export(deployment: Path, tmp_path: Path) -> None:
    """The deployment's own bank graph has another activation, with its digest in the manifest: integrity is content."""
    paths = read_manifest(deployment).base.bank
    shutil.copyfile(deployment / paths["relu_bias"], deployment / paths["gelu_bias"])
    reseal(deployment)
    with pytest.raises(GraphError, match=r"bank graph, modality 'text'.*does not compute the adapter"):
        export_adapter(make(tmp_path / "topics", deployment), deployment)
    assert "plain" in export_adapter(make(tmp_path / "plain", deployment, bias=False), deployment).tasks


def test_removing_an_unknown_task_names_those_there(deployment: Path, tmp_path: Path) -> None:
    export_adapter(make(tmp_path / "topics", deployment), deployment)
    with pytest.raises(UnknownTaskError, match=r"'topic' is not deployed here; deployed are: topics"):
        remove_task(deployment, "topic")


def test_name_is_the_folder_s_own_however_it_is_written(deployment: Path, tmp_path: Path) -> None:
    source = make(tmp_path / "topics", deployment)
    assert export_adapter(source / ".." / "topics" / ".", deployment).tasks.keys() == {"topics"}
