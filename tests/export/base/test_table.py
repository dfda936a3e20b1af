"""The table in the checkpoint's own precision: what is looked up is what PyTorch's embedding module returns."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers.folds import export_folded
from helpers.host_device import HostDevice
from helpers.runtime import TASKS, random_adapter, reseal, write_adapter
from helpers.tiny_ggufs import write_gguf
from helpers.tiny_models import FAMILIES, VOCAB_SIZE
from helpers.tiny_tokenizer import make_tokenizer
from safetensors.torch import save_file

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.export.base.table import _check_fingerprint
from adalink.runtime import Deployment
from adalink.runtime.device.engine import upload_table
from adalink.runtime.errors import GraphError, IntegrityError
from adalink.runtime.storage.embedding_table import EmbeddingTable, open_table
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.table_schema import TableStorage
from adalink.tools.parity.checks.adapter import check_table
from adalink.training.models.loading import base_fingerprint, load_base

KINDS: dict[str, tuple[dict[str, Any], str | None]] = {
    "alpha": (TASKS["alpha"], None),
    "table": (TASKS["alpha"], "table"),
    "rank": (TASKS["beta"], "rank"),
    "ids": ({"rank": 4, "activation": "identity", "bias": False, "scope": "all", "input": "ids"}, None),
}
WIDE = 64  # a width that blocks of 32 weights fill


def rounded(family: str, dtype: str) -> Any:
    """A float32 model of which every weight is a number of ``dtype``, as one that is loaded from such a file."""
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    return model


def module_rows(model: Any) -> Any:
    with torch.no_grad():
        return model.get_input_embeddings()(torch.arange(VOCAB_SIZE))


def looked_up(folder: Path) -> Any:
    with Deployment.open(folder) as deployment:
        return deployment.input_embeddings(np.arange(VOCAB_SIZE)[None])[0]


def table_bytes(folder: Path, manifest: Manifest) -> int:
    header = int.from_bytes((folder / manifest.base.embeddings).read_bytes()[:8], "little")
    return (folder / manifest.base.embeddings).stat().st_size - 8 - header


@pytest.mark.parametrize(("family", "dtype"), [("qwen2", "bfloat16"), ("gemma3", "float16"), ("bert", "float16")])
def test_sixteen_bits_are_kept_and_give_the_modules_numbers(family: str, dtype: str, tmp_path: Path) -> None:
    """Gemma's head is tied: as long as it is not quantised, the table would be read there."""
    model, lines = rounded(family, dtype), []
    quantization = "int8" if family == "gemma3" else None
    manifest = export_base(model, tmp_path, quantization=quantization, progress=lines.append)
    scale = float(model.get_input_embeddings().embed_scale) if family == "gemma3" else 1.0
    assert manifest.base.table == TableStorage(encoding=dtype, scale=scale)
    assert f"writing the embedding table in {dtype}" in lines
    assert manifest.base.fingerprint == base_fingerprint(model)
    assert table_bytes(tmp_path, manifest) == VOCAB_SIZE * 48 * 2
    assert looked_up(tmp_path).tobytes() == module_rows(model).numpy().tobytes()


def test_what_sixteen_bits_would_round_stays_as_it_is(tmp_path: Path) -> None:
    """One number of one row, in its last bit: the others would fit."""
    model, lines = rounded("qwen2", "bfloat16"), []
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[VOCAB_SIZE - 1, 5] = float(np.nextafter(weight[VOCAB_SIZE - 1, 5].numpy(), np.float32(9)))
    manifest = export_base(model, tmp_path, progress=lines.append)
    assert manifest.base.table is None
    assert "writing the embedding table in float32: bfloat16 and float16 would round it" in lines
    assert looked_up(tmp_path).tobytes() == module_rows(model).numpy().tobytes()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied llama of which the table is stored in Q8_0, as of SmolLM2."""
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(FAMILIES["llama"]().config)
    config.hidden_size, config.head_dim, config.tie_word_embeddings = WIDE, 16, True
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(
        path, LlamaForCausalLM(config), "llama", kind=lambda name: "Q8_0" if name == "token_embd.weight" else "F32"
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_blocks_of_a_gguf_file_are_kept(gguf: Path, dtype: str, tmp_path: Path) -> None:
    manifest = export_base(gguf, tmp_path, dtype=dtype)
    assert manifest.base.table == TableStorage(encoding="Q8_0")
    assert table_bytes(tmp_path, manifest) == VOCAB_SIZE * (WIDE // 32 * 34)
    model = load_base(gguf)  # dequantised by gguf-py
    assert manifest.base.fingerprint == base_fingerprint(model)
    expected = module_rows(model.to(getattr(torch, dtype))).numpy()
    assert looked_up(tmp_path).tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A bfloat16 checkpoint, deployed with every kind of task."""
    root = tmp_path_factory.mktemp("half")
    model = rounded("qwen2", "bfloat16")
    base = export_base(model, root / "deployment", tokenizer=make_tokenizer()).base
    for seed, (task, (settings, fold)) in enumerate(KINDS.items()):
        adapter = random_adapter(base.fingerprint, base.hidden_size, seed, **settings)
        source = write_adapter(root / task, adapter)
        if fold is None:
            export_adapter(source, root / "deployment")
        else:
            export_folded(source, root / "deployment", task, fold)
    return model, root / "deployment"


def test_verify_finds_a_single_bit_of_a_row(half: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = half
    reference: Any = SimpleNamespace(embeddings=lambda ids: module_rows(model)[ids].double().numpy())
    with Deployment.open(folder) as deployment:
        assert check_table(deployment, reference).passed
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copied / "base/embeddings.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1  # the lowest bit of the last number
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="has digest"):
        Deployment.open(copied)
    reseal(copied)
    with Deployment.open(copied) as deployment:
        assert not check_table(deployment, reference).passed


def test_a_table_written_wrongly_is_not_committed(half: tuple[Any, Path]) -> None:
    base = read_manifest(half[1]).base
    table = open_table(half[1] / base.embeddings, base)
    _check_fingerprint(table, base)
    bits = table.parts[0].copy()
    bits[40, 7] ^= 1
    with pytest.raises(GraphError, match="the checkpoint has sha256"):
        _check_fingerprint(EmbeddingTable(bits, "float32", base.table), base)


def test_a_device_gets_expanded_rows(half: tuple[Any, Path]) -> None:
    base, device = read_manifest(half[1]).base, HostDevice()
    address = upload_table(device, open_table(half[1] / base.embeddings, base))
    received = device._blocks[address][0]
    start = address - received.ctypes.data
    expected = module_rows(half[0]).numpy().tobytes()
    assert received[start : start + len(expected)].tobytes() == expected


def test_tasks_act_on_expanded_rows(half: tuple[Any, Path], tmp_path: Path) -> None:
    """The same tasks on the same numbers in float32, as older kits stored them, give the same bits."""
    model, folder = half
    older = Path(shutil.copytree(folder, tmp_path / "older"))
    manifest = read_manifest(older)
    save_file({"embeddings": module_rows(model).contiguous()}, older / manifest.base.embeddings)
    reseal(older, base=msgspec.structs.replace(manifest.base, table=None))
    ids = np.arange(VOCAB_SIZE)[None]
    tasks = [None, *manifest.tasks]
    with Deployment.open(folder) as now, Deployment.open(older) as then:
        for task in tasks:
            assert now.input_embeddings(ids, tasks=task).tobytes() == then.input_embeddings(ids, tasks=task).tobytes()
        rows = np.tile(ids[:, :8], (len(tasks), 1))
        assert now.input_embeddings(rows, tasks=tasks).tobytes() == then.input_embeddings(rows, tasks=tasks).tobytes()
