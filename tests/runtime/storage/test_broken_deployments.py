"""A deployment that is not, byte for byte, what was written is refused with a typed error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from helpers.runtime import reseal
from safetensors.numpy import save_file

from adalink.export.adapter.bank_graph import build_bank_graph
from adalink.runtime import Deployment, receipt
from adalink.runtime.errors import (
    BackendError,
    ContractError,
    DeploymentError,
    GraphError,
    IntegrityError,
    ManifestError,
)
from adalink.runtime.ort.backend import OnnxRuntimeBackend
from adalink.runtime.ort.errors import guard, onnxruntime_errors
from adalink.runtime.ort.static_cache import StaticCacheDecodeState
from adalink.runtime.receipt import make_receipt
from adalink.runtime.storage import integrity
from adalink.runtime.storage import verification_cache as verified
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.embedding_table import open_table
from adalink.runtime.storage.integrity import locate, map_verified, read_verified, verify_files
from adalink.runtime.storage.manifest import FileRecord, Manifest
from adalink.runtime.storage.manifest_io import encode_manifest, read_manifest
from adalink.runtime.storage.verification_cache import verify_once


@pytest.fixture
def copy(llama: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama.folder, tmp_path / "copy"))


def deployed_files(folder: Path) -> list[str]:
    return ["manifest.json", *sorted(read_manifest(folder).files)]


def test_every_file_is_listed_and_nothing_else_is_there(copy: Path) -> None:
    present = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert present - {".lock"} == set(deployed_files(copy))


def test_a_flipped_byte_anywhere_is_found(copy: Path) -> None:
    rng = np.random.default_rng(7)
    for name in deployed_files(copy):
        path = copy / name
        whole = path.read_bytes()
        positions = {0, len(whole) - 1, *(int(p) for p in rng.integers(0, len(whole), 3))}
        for position in positions:
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
            with pytest.raises((ManifestError, IntegrityError)):
                Deployment.open(copy, full_check=True)
        path.write_bytes(whole)
    Deployment.open(copy, full_check=True).close()


@pytest.mark.parametrize(
    "read",
    [
        lambda folder, manifest, path: verify_files(folder, manifest, [path]),
        lambda folder, manifest, path: verify_once(folder, manifest, [path]),
        read_verified,
        map_verified,
        lambda folder, manifest, path: make_receipt(folder, manifest, [path], 1, 1),
    ],
    ids=["verify_files", "verify_once", "read_verified", "map_verified", "make_receipt"],
)
def test_a_file_that_goes_away_or_cannot_be_opened(
    copy: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path, Manifest, str], Any]
) -> None:
    manifest = read_manifest(copy)
    path = manifest.base.embeddings

    def locate_and_remove(folder: Path, relative: str) -> Path:
        found = locate(folder, relative)
        found.unlink()
        return found

    for module in (integrity, verified, receipt):
        monkeypatch.setattr(module, "locate", locate_and_remove)
    with pytest.raises(IntegrityError, match=f"{path} cannot be read: No such file"):
        read(copy, manifest, path)
    monkeypatch.undo()
    # A folder opens as no file does, whoever asks; what a file without permission does depends on that.
    (copy / path).mkdir()
    for module in (integrity, verified, receipt):
        monkeypatch.setattr(module, "locate", lambda folder, relative: folder / relative)
    size = (copy / path).stat().st_size
    files = manifest.files | {path: FileRecord(sha256=manifest.files[path].sha256, size_bytes=size)}
    with pytest.raises(IntegrityError, match=f"{path} cannot be read: Is a directory"):
        read(copy, msgspec.structs.replace(manifest, files=files), path)


def test_truncated_longer_and_missing_files_are_named(copy: Path) -> None:
    for name in deployed_files(copy)[1:]:
        path = copy / name
        whole = path.read_bytes()
        for changed in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
            path.write_bytes(changed)
            with pytest.raises(IntegrityError, match=rf"{name} has \d+ bytes, the manifest says {len(whole)}"):
                Deployment.open(copy, full_check=True)
        path.unlink()
        with pytest.raises(IntegrityError, match=rf"{name}.*cannot be found"):
            Deployment.open(copy, full_check=True)
        path.write_bytes(whole)


def test_a_link_to_an_identical_file_outside_is_refused(copy: Path, tmp_path: Path) -> None:
    path = copy / "base" / "tokenizer.json"
    shutil.move(path, tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(IntegrityError, match="outside the deployment"):
        Deployment.open(copy, full_check=True)


def test_a_chat_template_that_is_not_utf8_is_refused(copy: Path) -> None:
    path = copy / "base" / "chat_template.jinja"
    path.write_bytes(path.read_bytes() + b"\xff")
    reseal(copy)
    with Deployment.open(copy) as opened, pytest.raises(IntegrityError, match=r"jinja: byte \d+ is not UTF-8; export"):
        opened.generate(["a"], chat=True)


def test_a_task_changed_while_open_is_found_at_its_first_use(copy: Path) -> None:
    with Deployment.open(copy) as opened:
        path = copy / "tasks" / "beta" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[::-1])
        with pytest.raises(IntegrityError, match=r"tasks/beta/adapter_model\.safetensors has digest"):
            opened.run(input_ids=[[5, 6]], tasks="beta")
        opened.run(input_ids=[[5, 6]], tasks="alpha")


def test_a_task_of_another_base_is_not_run_with_this_one(copy: Path) -> None:
    """Its files and digests are as the manifest says: only its own words tell that it is for another base."""
    base = read_manifest(copy).base
    reseal(copy, base=msgspec.structs.replace(base, fingerprint="sha256:" + "ab" * 32))
    with Deployment.open(copy) as opened, pytest.raises(ContractError, match=rf"for {base.fingerprint}, expected was"):
        opened.input_embeddings([[5]], tasks="alpha")


def test_a_changed_engine_shows_in_the_receipt(copy: Path) -> None:
    with Deployment.open(copy) as opened:
        assert opened.receipt().unchanged
        path = copy / opened.manifest.base.embeddings
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert not opened.receipt().unchanged


def renamed_graph(folder: Path, old: str, new: str) -> None:
    """Rename an input or output of the base graph, and make the manifest agree with the file."""
    manifest = read_manifest(folder)
    relative = next(iter(manifest.variants.values())).graph
    model = onnx.load(folder / relative, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if value.name == old:
            value.name = new
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
    onnx.save(model, folder / relative)
    path = folder / relative
    record = FileRecord(sha256=digest_file(path), size_bytes=path.stat().st_size)
    manifest = msgspec.structs.replace(manifest, files={**manifest.files, relative: record})
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))


@pytest.mark.parametrize("name", ["inputs_embeds", "logits_at", "past_key_values.1.value", "logits", "present.0.key"])
def test_a_graph_with_other_names_says_which(copy: Path, name: str) -> None:
    renamed_graph(copy, name, "surprise")
    with pytest.raises(GraphError, match=rf"'{name}' does not match the contract"):
        Deployment.open(copy)


def test_a_file_that_is_no_graph_is_refused_by_the_engine(llama: Any) -> None:
    base = read_manifest(llama.folder).base
    with pytest.raises(BackendError, match="ONNX Runtime refused"):
        OnnxRuntimeBackend("onnxruntime-cpu", 1).open_bank("gelu", b"not a graph", base)


def test_a_bank_graph_that_is_none_is_refused(llama: Any) -> None:
    base = read_manifest(llama.folder).base
    backend = OnnxRuntimeBackend("onnxruntime-cpu", 1)
    narrow = build_bank_graph("gelu", 49, "float32").SerializeToString()
    with pytest.raises(GraphError, match=r"width 49.*width 48"):
        backend.open_bank("gelu", narrow, base)
    half = build_bank_graph("gelu", 48, "float16").SerializeToString()
    with pytest.raises(GraphError, match=r"tensor\(float16\).*takes tensor\(float\)"):
        backend.open_bank("gelu", half, base)
    task = (llama.folder / "tasks" / "alpha" / "adapter.onnx").read_bytes()
    with pytest.raises(GraphError, match="input 'down' does not match"):
        backend.open_bank("gelu", task, base)


def test_an_embedding_table_of_another_shape_is_refused(llama: Any, tmp_path: Path) -> None:
    shared, path = read_manifest(llama.folder).base, tmp_path / "embeddings.safetensors"
    table = open_table(llama.folder / shared.embeddings, shared)
    assert table.shape == (96, 48)
    with pytest.raises(IntegrityError, match="Export the base again"):
        open_table(llama.folder / shared.embeddings, msgspec.structs.replace(shared, vocab_size=96_000))
    save_file({"embeddings": np.array(table.block(0, 96))}, path)
    base = msgspec.structs.replace(shared, table=None)
    assert open_table(path, base).shape == (96, 48)
    for changes in ({"vocab_size": 97}, {"hidden_size": 24}, {"embedding_dtype": "float16"}):
        with pytest.raises(IntegrityError, match="expected one tensor 'embeddings'"):
            open_table(path, msgspec.structs.replace(base, **changes))


def test_every_exception_of_onnx_runtime_is_mapped() -> None:
    import onnxruntime

    kinds = onnxruntime_errors(onnxruntime)
    assert {"Fail", "InvalidArgument", "NoSuchFile", "InvalidProtobuf", "InvalidGraph", "RuntimeException"} <= {
        kind.__name__ for kind in kinds
    }
    for kind in set(kinds) - {UnicodeDecodeError}:  # tests/runtime/ort/test_open_session.py has that one

        def raise_it(kind: type[Exception] = kind) -> None:
            raise kind("it broke\nsecond line")

        with pytest.raises(BackendError, match=r"here: ONNX Runtime refused: it broke$"):
            guard(onnxruntime, "here", raise_it)
    with pytest.raises(ZeroDivisionError):
        guard(onnxruntime, "here", lambda: 1 / 0)


def test_a_refusal_in_the_middle_of_a_text_is_ours(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its buffers bound ONNX Runtime raises another exception than without."""
    step = StaticCacheDecodeState.step

    def go_too_far(self: StaticCacheDecodeState, inputs_embeds: Any) -> None:
        self._lengths += 1000
        step(self, inputs_embeds)

    monkeypatch.setattr(StaticCacheDecodeState, "step", go_too_far)
    with Deployment.open(llama.folder) as opened, pytest.raises(BackendError, match=r"ONNX Runtime refused: .*execut"):
        opened.generate(["abc", "de"], max_new_tokens=3)


def test_an_interrupted_first_export_is_explained(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(DeploymentError, match="if an export was interrupted"):
        Deployment.open(tmp_path)
