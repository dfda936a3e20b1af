"""Adapter folders: what is saved is what is loaded, and nothing half-made or foreign is ever accepted."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from helpers.tiny_models import DECODERS, token_ids
from safetensors.numpy import load_file, save_file

from adalink.runtime.errors import AdapterError, ContractError, WriteError
from adalink.runtime.storage.adapter import make_adapter, read_adapter
from adalink.training.adapter_io import load_adapter, save_adapter, to_adapter
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import base_fingerprint

CONFIG = AdaLinkConfig(rank=4, activation="silu", bias=True, modalities=("text", "vision"), scope="prompt")


def make(model, config=CONFIG, seed=5):
    """A checked adapter with seeded weights."""
    with attach(model, config) as attached:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in attached.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return to_adapter(attached, "tiny-llama")


@pytest.fixture
def model():
    return DECODERS["llama"]()


@pytest.fixture
def folder(model, tmp_path):
    save_adapter(tmp_path / "adapter", make(model))
    return tmp_path / "adapter"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stored_weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_round_trip(model, folder):
    saved = make(model)
    with load_adapter(folder, model) as attached:
        assert attached.config == CONFIG
        loaded = to_adapter(attached, "tiny-llama")
        assert not any(module.training for module in attached.adapters.modules())
    assert loaded.digest == saved.digest
    assert all(np.array_equal(weight, loaded.weights[name]) for name, weight in saved.weights.items())


def test_save_attached_model_writes_what_to_adapter_gives(model, folder, tmp_path):
    with load_adapter(folder, model) as attached:
        save_adapter(tmp_path / "direct", attached)
    direct, expected = read_adapter(tmp_path / "direct"), read_adapter(folder)
    assert direct.digest == expected.digest
    assert direct.config.rank == CONFIG.rank


def test_loaded_adapter_computes_the_same(model, tmp_path):
    config = AdaLinkConfig(rank=4, bias=True)
    save_adapter(tmp_path / "adapter", make(model, config))
    ids = token_ids(seed=1)
    with torch.no_grad():
        with attach(model, config) as attached:
            state = {name: torch.from_numpy(weight) for name, weight in stored_weights(tmp_path / "adapter").items()}
            attached.adapters.load_state_dict(state)
            wanted = model(ids).logits
        with load_adapter(tmp_path / "adapter", model):
            got = model(ids).logits
        plain = model(ids).logits
    assert torch.equal(got, wanted)
    assert (got - plain).abs().max() > 0.05


def test_files_are_those_of_the_format(model, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "ADALINK",
        "base_model_name_or_path": "tiny-llama",
        "base_fingerprint": base_fingerprint(model),
        "hidden_size": 48,
        "rank": 4,
        "activation": "silu",
        "bias": True,
        "modalities": ["text", "vision"],
        "scope": "prompt",
    }
    shapes = {name: weight.shape for name, weight in stored_weights(folder).items()}
    assert shapes["vision.down.weight"] == (4, 48)
    assert shapes["text.up.weight"] == (48, 4)
    assert shapes["text.down.bias"] == (4,)
    assert shapes["vision.up.bias"] == (48,)
    assert len(shapes) == 8


def test_other_base_is_refused_naming_both(folder):
    other = DECODERS["qwen3"]()
    with pytest.raises(ContractError) as caught:
        load_adapter(folder, other)
    assert base_fingerprint(other) in str(caught.value)
    assert json.loads((folder / "adapter_config.json").read_text())["base_fingerprint"] in str(caught.value)
    attach(other, CONFIG).detach()  # nothing was left attached


def test_one_changed_embedding_is_another_base(model, folder):
    with torch.no_grad():
        model.get_input_embeddings().weight[90, 3] += 1e-3
    with pytest.raises(ContractError):
        load_adapter(folder, model)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_weights(model, folder, share):
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(AdapterError, match=r"not a complete safetensors file"):
        load_adapter(folder, model)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_numbers(model, folder, value):
    weights = stored_weights(folder)
    weights["vision.up.weight"][7, 2] = value
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"'vision.up.weight' holds NaN or infinity"):
        load_adapter(folder, model)


def test_diverged_training_is_not_saved(model):
    with attach(model, CONFIG) as attached, torch.no_grad():
        attached.adapters["text"].up.weight[0, 0] = torch.nan
        with pytest.raises(AdapterError, match="train again with a lower rate"):
            to_adapter(attached, "tiny")


@pytest.mark.parametrize(("field", "value"), [("rank", 5), ("hidden_size", 47), ("bias", False), ("rank", 0)])
def test_config_that_belies_the_weights(model, folder, field, value):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(AdapterError, match=r"adapter .*: .*"):
        load_adapter(folder, model)


def test_pickled_weights_are_refused(model, folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin is pickled"):
        load_adapter(folder, model)


def test_replacing_is_whole(model, folder):
    newer = make(model, seed=6)
    save_adapter(folder, newer, {"training.json": b"{}\n"})
    assert read_adapter(folder).digest == newer.digest
    assert sorted(contents(folder)) == ["adapter_config.json", "adapter_model.safetensors", "training.json"]
    save_adapter(folder, make(model))
    assert "training.json" not in contents(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_full_disk_leaves_the_old_one(model, folder, monkeypatch, failing):
    before, calls, sync = contents(folder), [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"No space left on device; what was there is as it was"):
        save_adapter(folder, make(model, seed=6), {"training.json": b"{}"})
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_kernel_without_exchange(model, folder, monkeypatch):
    class OldLibrary:
        """A C library from before ``renameat2``."""

    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: OldLibrary())
    newer = make(model, seed=6)
    save_adapter(folder, newer)
    assert read_adapter(folder).digest == newer.digest
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_a_crash_at_any_moment_leaves_old_or_new(model, folder, tmp_path):
    """A child process is killed before its n-th file operation; the folder must hold one whole adapter each time."""
    newer = make(model, seed=6)
    old, new = read_adapter(folder).digest, newer.digest
    seen = set()
    for moment in range(1, 20):
        child = os.fork()
        if child == 0:
            _die_at(moment)
            save_adapter(folder, newer)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        seen.add(read_adapter(folder).digest)
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert seen == {old, new}
    assert os.waitstatus_to_exitcode(status) == 0


def _die_at(moment):
    """Count the audit events of opening, renaming and removing, and exit hard at the given one."""
    count = 0

    def watch(event, args):
        nonlocal count
        if event in {"open", "os.rename", "os.mkdir", "shutil.rmtree", "os.remove", "os.rmdir", "ctypes.dlsym"}:
            count += 1
            if count == moment:
                os._exit(9)

    sys.addaudithook(watch)


def test_foreign_folder_is_not_replaced(model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterError, match=r"not empty and holds no adapter_config.json"):
        save_adapter(tmp_path / "mine", make(model))
    assert contents(tmp_path / "mine") == {"thesis.txt": b"years of work"}
    with pytest.raises(AdapterError, match="is a file"):
        save_adapter(tmp_path / "mine" / "thesis.txt", make(model))


def test_digest_heeds_what_computes_and_not_the_name(model):
    adapter = make(model)
    renamed = msgspec.structs.replace(adapter.config, base_model_name_or_path="elsewhere")
    assert make_adapter(renamed, dict(adapter.weights)).digest == adapter.digest
    assert make(model, seed=6).digest != adapter.digest
    assert (
        make(
            model, AdaLinkConfig(rank=4, activation="gelu", bias=True, modalities=("text", "vision"), scope="prompt")
        ).digest
        != adapter.digest
    )
