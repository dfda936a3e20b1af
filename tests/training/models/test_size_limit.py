"""A config that describes far more than its weight files hold is refused before that much is made."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.tiny_ggufs import tokenizer_metadata, write_gguf
from helpers.tiny_tokenizer import make_tokenizer
from torch.nn.modules.module import register_module_module_registration_hook

from adalink.runtime.errors import ModelError
from adalink.training.models.loading import load_base, load_tokenizer
from adalink.training.models.size_limit import check_counts, limit_model_size

LAYER_COUNTS = {
    "llama": "num_hidden_layers",
    "gemma3": "num_hidden_layers",  # whose config makes a list of them
    "gpt2": "n_layer",
    "bert": "num_hidden_layers",
    "t5": "num_decoder_layers",
}
SIZES = {
    "llama": ("hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_key_value_heads"),
    "gpt2": ("n_positions", "n_inner", "vocab_size"),
    "t5": ("d_model", "d_ff", "vocab_size"),
}


def save(family: str, folder: Path, **changes: Any) -> Path:
    tiny_models.FAMILIES[family]().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "layer_types"} | changes))
    return folder


@pytest.fixture
def made() -> Iterator[list[str]]:
    """Names of the modules that are made meanwhile."""
    names: list[str] = []
    handle = register_module_module_registration_hook(lambda parent, name, module: names.append(name))
    yield names
    handle.remove()


@pytest.mark.parametrize("family", LAYER_COUNTS)
@pytest.mark.parametrize("count", [10**6, 2**31, 10**30])
def test_millions_of_layers(family: str, count: int, tmp_path: Path, made: list[str]) -> None:
    folder, field = tmp_path / "tiny", LAYER_COUNTS[family]
    save(family, folder, **{field: count})
    made.clear()
    with pytest.raises(ModelError, match=rf"config.json says {field} \S+, and the weight files hold \d+ tensors"):
        load_base(folder)
    assert not made


def test_hundreds_of_thousands_of_layers(tmp_path: Path) -> None:
    """As many as a config can still make a list of."""
    folder = save("gemma3", tmp_path / "tiny", num_hidden_layers=300_000)
    with pytest.raises(ModelError, match=r"num_hidden_layers 3e\+05, and the weight files hold \d+ tensors"):
        load_base(folder)


@pytest.mark.parametrize("family", LAYER_COUNTS)
def test_hundreds_of_layers(family: str, tmp_path: Path, made: list[str]) -> None:
    """Counts that the first check lets pass; some of the layers are made until they outgrow the files."""
    folder = save(family, tmp_path / "tiny", **{LAYER_COUNTS[family]: 900})
    made.clear()
    with pytest.raises(ModelError, match=r"describes a model of more than \S+ numbers, and the weight files hold"):
        load_base(folder)
    assert len(made) < 1000


@pytest.mark.parametrize(("family", "field"), [(family, field) for family, names in SIZES.items() for field in names])
@pytest.mark.parametrize("size", [10**6, 2**31, 10**12])
def test_absurd_sizes(family: str, field: str, size: int, tmp_path: Path, made: list[str]) -> None:
    folder = save(family, tmp_path / "tiny", **{field: size})
    made.clear()
    with pytest.raises(ModelError, match=r"numbers, and the weight files hold|cannot load it: RuntimeError: Storage"):
        load_base(folder)
    assert len(made) < 60


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_tokenizer_beside_millions_of_layers(family: str, tmp_path: Path) -> None:
    """To load it, transformers reads the config too."""
    make_tokenizer().save_pretrained(tmp_path)
    save(family, tmp_path, num_hidden_layers=2**32)
    with pytest.raises(ModelError, match=r"config.json says num_hidden_layers 4.295e\+09; expected at most 100000"):
        load_tokenizer(tmp_path)
    metadata = tokenizer_metadata() | {f"{family}.block_count": 2**32 - 1}
    path = write_gguf(tmp_path / "tiny.gguf", tiny_models.FAMILIES[family](), family, metadata=metadata)
    with pytest.raises(ModelError, match="say 4294967295 layers and it holds tensors of 2"):
        load_tokenizer(path)


def test_a_gguf_file_of_absurd_sizes(tmp_path: Path) -> None:
    sizes = {"llama.feed_forward_length": 2**31, "llama.embedding_length": 2**20}
    for key, size in sizes.items():
        path = write_gguf(tmp_path / "tiny.gguf", tiny_models.llama(), "llama", metadata={key: size})
        with pytest.raises(ModelError, match="numbers, and the weight files hold"):
            load_base(path)


def test_parts_of_a_config_are_counted() -> None:
    config = {"vision_config": {"depth": 5000}, "parts": [{"num_labels": 5000}], "is_layer": True, "block_size": 10**9}
    with pytest.raises(ModelError, match=r"config.json says (depth|num_labels) 5000, and the weight files hold 4999"):
        check_counts(config, 4999, "a")
    check_counts(config, 5000, "a")
    check_counts({"max_window_layers": 28}, 3, "a")  # which models of fewer layers have by default


def test_matrices_in_memory_are_limited_closer() -> None:
    """A tied matrix counts once; what is missing from the files is filled at random."""
    tied = torch.nn.Parameter(torch.zeros(10))
    with limit_model_size(10, "a"):
        modules = [torch.nn.Module() for _ in range(9)]
        for module in modules:
            module.weight = tied
        modules[0].weight = torch.nn.Parameter(torch.zeros(10))
        with pytest.raises(ModelError, match="describes a model of more than 21 numbers, and the weight files hold 10"):
            modules[1].weight = torch.nn.Parameter(torch.zeros(1))


def test_other_threads_and_later_modules_are_not_limited() -> None:
    with limit_model_size(1, "a"):
        thread = threading.Thread(target=lambda: found.append(torch.nn.Linear(9, 9)))
        found: list[torch.nn.Module] = []
        thread.start()
        thread.join()
        with pytest.raises(ModelError):
            torch.nn.Linear(9, 9)
    assert found
    torch.nn.Linear(9, 9)
