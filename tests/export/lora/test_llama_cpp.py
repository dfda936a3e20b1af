"""LoRAs of the token embedding as GGUF files: read by the ``gguf`` package, and run by llama.cpp itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from helpers.loras import NEW, reference, seeded_task
from helpers.runtime import write_adapter
from helpers.tiny_ggufs import wide, write_gguf
from helpers.tiny_models import VOCAB_SIZE, token_ids

from adalink.export.lora.base import LoraBase, base_of_checkpoint
from adalink.export.lora.export import export_lora
from adalink.export.lora.untied_gguf import is_tied
from adalink.runtime.errors import ConfigError, DeploymentError
from benchmarks.hosts.llama_cpp import llama_cpp

IDS = token_ids(9, 2, 6)
# Llama.cpp wants queries as wide as the embeddings of some families, as `wide` makes them.
WIDTH, RANK = 64, 4
FAMILIES_TRIED = [
    "llama",
    "gemma3",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "qwen3", "gpt2", "phi3")),
]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoraBase]:
    bases: dict[str, LoraBase] = {}

    def make(family: str) -> LoraBase:
        if family not in bases:
            path = tmp_path_factory.mktemp("bases") / f"{family}.gguf"
            bases[family] = base_of_checkpoint(str(write_gguf(path, wide(family), family)))
        return bases[family]

    return make


def foreign_base(path: Path) -> LoraBase:
    """A base of the same sizes with another table."""
    model = wide("qwen2")
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight.flip(1))
    return base_of_checkpoint(str(write_gguf(path, model, "qwen2")))


def export(base: LoraBase, root: Path, name: str = "task", **options: Any) -> Path:
    adapter = seeded_task(base.contract.fingerprint, width=WIDTH, **options.pop("settings", {}))
    export_lora(write_adapter(root / name, adapter), base, root / f"{name}.gguf", "gguf", **options)
    return root / f"{name}.gguf"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_the_file_is_as_llama_cpps_converter_writes_it(base_of: Callable[[str], LoraBase], tmp_path: Path) -> None:
    path = export(base_of("qwen2"), tmp_path)
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields.pop("adalink.base_fingerprint") == base_of("qwen2").contract.fingerprint
    assert fields == {
        "general.architecture": "qwen2",
        "general.type": "adapter",
        "general.name": "LoRA of the input embedding for qwen2",
        "adapter.type": "lora",
        "adapter.lora.alpha": RANK,
    }
    shapes = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    assert shapes == {
        "token_embd.weight.lora_a": (VOCAB_SIZE, RANK),
        "token_embd.weight.lora_b": (WIDTH, RANK),
    }


def test_the_untied_copy_holds_every_tensor_and_the_head(base_of: Callable[[str], LoraBase], tmp_path: Path) -> None:
    base, copy = base_of("llama"), tmp_path / "untied.gguf"
    export(base, tmp_path, untied_base=copy)
    before, after = GGUFReader(base.gguf), GGUFReader(copy)
    assert [field.contents() for field in after.fields.values()][3:] == [
        field.contents() for field in before.fields.values()
    ][3:]
    tensors = {tensor.name: tensor.data for tensor in before.tensors}
    tensors["output.weight"] = tensors["token_embd.weight"]
    assert [tensor.name for tensor in after.tensors] == list(tensors)
    for tensor in after.tensors:
        assert np.array_equal(tensor.data, tensors[tensor.name])
    again = base_of_checkpoint(str(copy))
    assert again.contract.fingerprint == base.contract.fingerprint
    assert not is_tied(copy)
    with pytest.raises(ConfigError, match=r"'output\.weight' already: leave --untied-base out"):
        export(again, tmp_path, replace=True, untied_base=tmp_path / "twice.gguf")


@pytest.mark.parametrize("family", FAMILIES_TRIED)
def test_llama_cpp_gives_probabilities_and_tokens_of_the_method(
    family: str, base_of: Callable[[str], LoraBase], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
    base, model = base_of(family), wide(family)
    assert base.gguf is not None
    untied = tmp_path / "untied.gguf" if is_tied(base.gguf) else None
    settings = {"activation": "silu"}
    path = export(base, tmp_path, settings=settings, untied_base=untied)
    adapter = seeded_task(base.contract.fingerprint, width=WIDTH, **settings)
    nothing = seeded_task(base.contract.fingerprint, width=WIDTH, size=0, activation="silu")
    other = foreign_base(tmp_path / "foreign.gguf")
    faulty = plant(path, export(other, tmp_path, "other", settings=settings), tmp_path)
    with llama_cpp(untied or base.gguf, [path, *faulty.values()], tmp_path / "log") as server:
        expected, tokens = reference(model, adapter, IDS)
        plain, _ = reference(model, nothing, IDS, 1)
        for row, ids in enumerate(IDS.tolist()):
            wanted, before = log_softmax(expected[row, -1]), log_softmax(plain[row, -1])
            # What llama.cpp itself rounds, without a LoRA: with one it may be off by some times that.
            limit = 8 * np.abs(server.log_probabilities(ids, VOCAB_SIZE) - before).max()
            off = {
                number: server.log_probabilities(ids, VOCAB_SIZE, [number]) - wanted
                for number in range(1 + len(faulty))
            }
            assert np.abs(off[0]).max() <= limit
            for number, fault in enumerate(faulty, 1):
                assert np.abs(off[number]).max() > 20 * limit, fault
            made = server.ask(ids, NEW, [0])["tokens"]
            assert made == tokens[row][: len(made)]
            assert len(made) == NEW or tokens[row][len(made)] == 2


def plant(path: Path, other: Path, root: Path) -> dict[str, Path]:
    """Copies of a LoRA with a fault each; ``other`` is one for another base."""
    first, foreign = GGUFReader(path).tensors[0], GGUFReader(other).tensors[0]
    assert first.name == foreign.name == "token_embd.weight.lora_a"
    rows = np.array(first.data)
    faults = {
        "transposed": rows.T.reshape(rows.shape),
        "rows off by one": np.roll(rows, 1, axis=0),
        "another base's table": np.array(foreign.data),
        "twice the scaling": 2 * rows,
    }
    written = {}
    for number, (name, values) in enumerate(faults.items()):
        data = bytearray(path.read_bytes())
        start = int(first.data_offset)
        data[start : start + rows.nbytes] = np.ascontiguousarray(values, "<f4").tobytes()
        written[name] = root / f"fault-{number}.gguf"
        written[name].write_bytes(data)
    return written


def test_a_tied_head_is_refused_with_the_way_out(base_of: Callable[[str], LoraBase], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"apply the LoRA to the head as well: write a copy .* --untied-base FILE"):
        export(base_of("llama"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


def test_a_base_is_never_overwritten(base_of: Callable[[str], LoraBase], tmp_path: Path) -> None:
    base = base_of("llama")
    assert base.gguf is not None
    with pytest.raises(DeploymentError, match="a folder or the model itself"):
        export(base, tmp_path, untied_base=base.gguf, replace=True)
    with pytest.raises(ConfigError, match="named for the LoRA and for the copy"):
        export(base, tmp_path, untied_base=tmp_path / "task.gguf")
    others = (base_of("qwen2").gguf, write_gguf(tmp_path / "other.gguf", wide("gemma3"), "gemma3"))
    for other in (*others, tmp_path / "task" / "adapter_config.json"):
        assert other is not None
        before = other.read_bytes()
        with pytest.raises(DeploymentError, match=r"is no such copy of llama\.gguf: it is not replaced"):
            export(base, tmp_path, untied_base=other, replace=True)
        assert other.read_bytes() == before
    copy = tmp_path / "copy.gguf"
    export(base, tmp_path, "first", untied_base=copy)
    with pytest.raises(DeploymentError, match="there already: pass --replace"):
        export(base, tmp_path, "second", untied_base=copy)
    export(base, tmp_path, "third", untied_base=copy, replace=True)
    model = write_gguf(tmp_path / "task.gguf", wide("qwen2"), "qwen2")
    before = model.read_bytes()
    with pytest.raises(DeploymentError, match="is no LoRA: it is not replaced"):
        export(base_of("qwen2"), tmp_path, replace=True)
    assert model.read_bytes() == before
