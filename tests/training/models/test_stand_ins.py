"""Checkpoints that are opened without reading their matrices: what each stand-in stands for, against transformers."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import tiny_models
from helpers.tiny_ggufs import write_gguf
from safetensors import safe_open
from torch.nn.utils.parametrize import register_parametrization

from adalink.training.models import lazy_files, loading
from adalink.training.models.loading import base_fingerprint, load_base, open_checkpoint, weights_digest
from adalink.training.models.stand_ins import StandIns
from adalink.training.models.weights import JoinedWeight, TensorWeight, read_pieces

GGUFS = ("llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt2")


def check_values(opened, stand_ins, reference) -> int:
    """Every weight must be that of a model which transformers loaded whole; returns how many are stand-ins."""
    expected = dict(reference.named_parameters())
    actual = dict(opened.named_parameters())
    assert actual.keys() == expected.keys()
    for name, parameter in actual.items():
        assert torch.equal(stand_ins.source(parameter).read().float(), expected[name]), name
    return sum(parameter in stand_ins for parameter in actual.values())


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2", "bert", "t5", "llava"])
def test_stand_ins_of_a_folder(tmp_path, family):
    model = {**tiny_models.FAMILIES, "llava": tiny_models.llava}[family]().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint, stand_ins = open_checkpoint(tmp_path)
    reference = load_base(tmp_path)
    matrices = sum(parameter.dim() > 1 for parameter in reference.parameters())
    assert check_values(checkpoint.model, stand_ins, reference) == matrices
    assert weights_digest(checkpoint.model, stand_ins) == weights_digest(reference)
    assert weights_digest(checkpoint.model) != weights_digest(reference), "the stand-ins themselves hold zeros"


@pytest.mark.parametrize("architecture", GGUFS)
def test_stand_ins_of_a_gguf_file(tmp_path, architecture):
    path = write_gguf(tmp_path / "tiny.gguf", getattr(tiny_models, architecture)(), architecture)
    checkpoint, stand_ins = open_checkpoint(path)
    assert check_values(checkpoint.model, stand_ins, load_base(path)) > 0
    assert checkpoint.model.generation_config.to_dict() == load_base(path).generation_config.to_dict()


def test_fingerprint_is_of_the_values(tmp_path):
    model = tiny_models.llama()
    model.save_pretrained(tmp_path)
    checkpoint, stand_ins = open_checkpoint(tmp_path)
    table = model.get_input_embeddings().weight.detach().numpy()
    state = hashlib.sha256(f"{table.shape[0]},{table.shape[1]};".encode() + table.tobytes())
    assert base_fingerprint(checkpoint.model, stand_ins) == f"sha256:{state.hexdigest()}"


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_the_table_is_tied_if_it_is_the_same(tmp_path, same):
    """transformers compares the two matrices; stand-ins of equal ones are equal."""
    from safetensors.torch import load_file, save_file

    model = tiny_models.llama()
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    if not same:
        head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if not same:
        with pytest.raises(loading.ModelError, match="holds both with different values"):
            open_checkpoint(tmp_path)
        return
    checkpoint, stand_ins = open_checkpoint(tmp_path)
    assert check_values(checkpoint.model, stand_ins, load_base(tmp_path)) > 0
    assert checkpoint.model.lm_head.weight is checkpoint.model.model.embed_tokens.weight


@pytest.mark.parametrize("fault", [torch.clone, lambda tensor: tensor.t().contiguous().t()])
def test_weights_that_transformers_computes_are_loaded_whole(tmp_path, monkeypatch, fault):
    model = tiny_models.llama()
    model.save_pretrained(tmp_path)
    real = lazy_files._LazySlice.__getitem__

    def changed(self, index):
        tensor = real(self, index)
        return fault(tensor) if tensor.shape == (96, 48) else tensor

    monkeypatch.setattr(lazy_files._LazySlice, "__getitem__", changed)
    checkpoint, stand_ins = open_checkpoint(tmp_path)
    assert check_values(checkpoint.model, stand_ins, load_base(tmp_path)) == 0


def test_a_part_of_a_stand_in_is_refused():
    stand_ins = StandIns()
    tensor = stand_ins.make(TensorWeight(torch.ones(4, 3)), torch.float32)
    with pytest.raises(AssertionError, match="a part of a stand-in"):
        stand_ins.source(tensor[1:])


def test_weights_come_in_pieces(monkeypatch):
    from adalink.training.models import weights

    monkeypatch.setattr(weights, "PIECE_BYTES", 100)
    parts = [torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows)) for rows in (5, 1, 9)]
    joined = JoinedWeight([TensorWeight(part) for part in parts])
    assert joined.shape == (15, 8)
    pieces = list(read_pieces(joined, torch.float16))
    assert [len(piece) for piece in pieces] == [6, 6, 3]
    assert torch.equal(torch.cat(pieces), torch.cat(parts).half())
    assert torch.equal(joined.read(4, 7), torch.cat(parts)[4:7])


def test_filling_gives_values_until_the_block_ends():
    stand_ins, values = StandIns(), torch.randn(4, 3)
    layer = torch.nn.Linear(3, 4, bias=False)
    layer.weight = torch.nn.Parameter(stand_ins.make(TensorWeight(values), torch.float32))
    with stand_ins.filled(layer.parameters()):
        assert torch.equal(layer.weight, values)
        assert layer.weight not in stand_ins
    assert layer.weight in stand_ins


def test_the_files_are_not_read(tmp_path, monkeypatch):
    """A planted fault: a file whose matrices cannot be read is opened all the same."""
    tiny_models.llama().save_pretrained(tmp_path)
    monkeypatch.setattr(lazy_files._Marks, "of", lambda self, weight: 1 + weight.name.__hash__() % 1000003)
    read: list[str] = []
    monkeypatch.setattr(lazy_files.SafetensorsWeight, "read", lambda self, *_: read.append(self.name))
    open_checkpoint(tmp_path)
    assert read == []
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert len(file.keys()) > 10


def test_another_thread_gets_values(tmp_path):
    model = tiny_models.llama()
    model.save_pretrained(tmp_path)
    with lazy_files.lazy_safetensors(StandIns(), torch.float32), ThreadPoolExecutor(1) as pool:
        other = pool.submit(load_base, tmp_path).result()
    assert weights_digest(other) == weights_digest(model)


class Doubled(torch.nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return 2 * weight


def test_a_parametrised_table_has_its_values():
    model = tiny_models.llama()
    register_parametrization(model.get_input_embeddings(), "weight", Doubled())
    stand_ins = StandIns()
    skeleton = stand_ins.skeleton(model)
    assert base_fingerprint(skeleton, stand_ins) == base_fingerprint(model)
    assert skeleton.model.layers[0].mlp.up_proj.weight in stand_ins
