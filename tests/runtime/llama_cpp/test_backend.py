"""What the backend refuses: another library, an altered file, another model's table, a GPU that is not there."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.llama_cpp import BACKEND
from helpers.runtime import Tiny, reseal

from adalink.runtime import Deployment
from adalink.runtime.backends import open_backend
from adalink.runtime.errors import BackendError, BackendUnavailableError, ContractError, IntegrityError, RequestError
from adalink.runtime.llama_cpp import library
from adalink.runtime.llama_cpp.context import LlamaModel
from adalink.runtime.llama_cpp.library import open_library
from adalink.runtime.llama_cpp.structures import ContextParams, ModelParams, check_defaults
from adalink.runtime.storage.manifest_io import read_manifest


@pytest.fixture
def copied(gguf: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gguf.folder, tmp_path / "deployment"))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(ContextParams, "n_seq_max", 0), (ContextParams, "type_k", 0), (ModelParams, "n_gpu_layers", 0)],
)
def test_another_structure_is_found(kind: type, field: str, value: int) -> None:
    names = {ModelParams: "llama_model_default_params", ContextParams: "llama_context_default_params"}
    params = getattr(open_library(), names[kind])()
    check_defaults(params, "of the test")
    setattr(params, field, value)
    with pytest.raises(BackendUnavailableError, match=f"{field} = .* by default, this kit expects"):
        check_defaults(params, "of the test")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    open_library.cache_clear()
    try:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(BackendUnavailableError, match=r"xllamacpp, which is not installed: pip .*llama-cpp"):
            open_backend(BACKEND)
    finally:
        open_library.cache_clear()


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "xllamacpp.so").write_bytes(b"no library")
    open_library.cache_clear()
    try:
        monkeypatch.setattr(library, "_find", lambda: tmp_path / "xllamacpp.so")
        with pytest.raises(BackendUnavailableError, match=r"xllamacpp\.so cannot be loaded: .*pip .*llama-cpp"):
            open_backend(BACKEND)
    finally:
        open_library.cache_clear()


def test_an_altered_file_is_refused(copied: Path) -> None:
    (path,) = (copied / "base").rglob("*.gguf")
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.gguf"):
        Deployment.open(copied, BACKEND)


def test_a_file_that_is_not_whole_is_said_to_be_so(gguf: Tiny, tmp_path: Path) -> None:
    (whole,) = (gguf.folder / "base").rglob("*.gguf")
    path = tmp_path / "half.gguf"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(BackendError, match=r"half\.gguf: llama\.cpp cannot load it: .*not within the file bounds"):
        LlamaModel(path)


def test_a_table_of_another_model_is_refused(copied: Path) -> None:
    base = read_manifest(copied).base
    path = copied / base.embeddings
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    rows = data[-base.vocab_size * base.hidden_size * 4 :].reshape(base.vocab_size, -1)
    rows[:] = rows[::-1].copy()
    path.write_bytes(data)
    reseal(copied)
    with pytest.raises(ContractError, match="other logits from the deployment's embeddings than from the tokens"):
        Deployment.open(copied, BACKEND)


def test_what_llama_cpp_does_not_do(gguf: Tiny) -> None:
    with pytest.raises(BackendUnavailableError, match="was built for the CPU alone"):
        Deployment.open(gguf.folder, BACKEND, gpu_layers=4)
    with pytest.raises(RequestError, match=r"only llama\.cpp puts layers on a GPU"):
        Deployment.open(gguf.folder, gpu_layers=4)
    with pytest.raises(BackendError, match="has no such KV cache"):
        Deployment.open(gguf.folder, BACKEND, kv_cache_dtype="int8")
    with pytest.raises(BackendError, match=r"only for llama\.cpp"):
        Deployment.open(gguf.folder)
    with (
        Deployment.open(gguf.folder, BACKEND, threads=1) as opened,
        pytest.raises(RequestError, match="256 sequences at most"),
    ):
        opened._runner.engine.sequences.take(257, 8)  # type: ignore[attr-defined]
