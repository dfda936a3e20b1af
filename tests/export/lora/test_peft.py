"""LoRAs of the input embedding in PEFT: what PEFT's model gives is what the method gives in PyTorch, in float64."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers.loras import ACTIVATIONS, NEW, reference, save_tiny, seeded_task
from helpers.runtime import write_adapter
from helpers.tiny_models import FAMILIES, VOCAB_SIZE, token_ids
from safetensors.numpy import load_file, save_file

from adalink.export.lora.base import LoraBase, base_of_checkpoint
from adalink.export.lora.export import Lora, export_lora
from adalink.runtime.storage.adapter import Adapter

IDS = token_ids(9, 3, 6)
# Tied and untied heads, embeddings that are scaled, and an encoder.
CASES = [
    *(("llama", activation, bias) for activation in ACTIVATIONS for bias in (False, True)),
    *((family, "gelu", True) for family in ("qwen2", "gemma", "gemma3", "gpt2", "bert")),
]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoraBase]:
    bases: dict[str, LoraBase] = {}

    def make(family: str) -> LoraBase:
        if family not in bases:
            folder = save_tiny(tmp_path_factory.mktemp("bases") / family, FAMILIES[family]())
            bases[family] = base_of_checkpoint(str(folder))
        return bases[family]

    return make


def export(adapter: Adapter, base: LoraBase, root: Path, form: str = "peft", **options: Any) -> tuple[Path, Lora]:
    out = root / f"lora.{form}"
    return out, export_lora(write_adapter(root / "task", adapter), base, out, form, **options)


def outputs(model: Any) -> tuple[np.ndarray, float]:
    """Outputs of a model with a LoRA, and a limit as of ``helpers.export.yardstick``."""
    found = []
    for each in (model, copy.deepcopy(model).double()):
        with torch.no_grad():
            made = each(input_ids=IDS, attention_mask=torch.ones_like(IDS))
        found.append(made.logits if hasattr(made, "logits") else made.last_hidden_state)
    return found[0].numpy(), 8 * float((found[0] - found[1]).abs().max())


def load(family: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied heads, which is what is tested
        return peft.PeftModel.from_pretrained(FAMILIES[family](), folder)


@pytest.mark.parametrize(("family", "activation", "bias"), CASES)
def test_peft_gives_outputs_and_tokens_of_the_method(
    family: str, activation: str, bias: bool, base_of: Callable[[str], LoraBase], tmp_path: Path
) -> None:
    base = base_of(family)
    adapter = seeded_task(base.contract.fingerprint, activation=activation, bias=bias)
    folder, written = export(adapter, base, tmp_path)
    assert (written.rank, written.tokens) == (3 + bias, VOCAB_SIZE)
    assert written.worst_ratio <= 1
    tuned, plain = load(family, folder), FAMILIES[family]()
    expected, tokens = reference(plain, adapter, IDS)
    received, limit = outputs(tuned)
    assert np.abs(received - expected).max() <= limit
    assert np.abs(outputs(plain)[0] - expected).max() > 100 * limit, "the task changes the output"
    if family != "bert":
        mask = torch.ones_like(IDS)
        made = tuned.generate(
            input_ids=IDS, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )
        for row, chosen in zip(made[:, IDS.shape[1] :].tolist(), tokens, strict=True):
            ended = chosen.index(2) if 2 in chosen else NEW  # transformers may not end so early
            assert row[:ended] == chosen[:ended]


FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "transposed": lambda first: first.T.reshape(first.shape),
    "twice the scaling": lambda first: 2 * first,
    "rows off by one": lambda first: np.roll(first, 1, axis=1),
}


@pytest.mark.parametrize("fault", [*FAULTS, "another base's table"])
def test_a_fault_in_the_factors_is_seen(fault: str, base_of: Callable[[str], LoraBase], tmp_path: Path) -> None:
    base = base_of("llama")
    adapter = seeded_task(base.contract.fingerprint)
    folder, _ = export(adapter, base, tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if name.endswith("lora_embedding_A"))
    if fault in FAULTS:
        tensors[name] = np.ascontiguousarray(FAULTS[fault](tensors[name]))
    else:
        other = base_of("qwen2")
        export(seeded_task(other.contract.fingerprint), other, tmp_path / "other")
        tensors[name] = load_file(tmp_path / "other" / "lora.peft" / "adapter_model.safetensors")[name]
    save_file(tensors, path)
    received, limit = outputs(load("llama", folder))
    assert np.abs(received - reference(FAMILIES["llama"](), adapter, IDS)[0]).max() > 100 * limit


def test_half_the_size_within_its_bound(base_of: Callable[[str], LoraBase], tmp_path: Path) -> None:
    base = base_of("gemma3")
    adapter = seeded_task(base.contract.fingerprint)
    folder, written = export(adapter, base, tmp_path, dtype="float16")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float16)}
    assert 0.1 < written.worst_ratio <= 1
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] == pytest.approx(4 / 48**0.5)
    received, _ = outputs(load("gemma3", folder))
    expected, _ = reference(FAMILIES["gemma3"](), adapter, IDS)
    # Numbers of 11 bits: a thousandth of what the task changes, and far more than float32 would be off.
    change = np.abs(outputs(FAMILIES["gemma3"]())[0] - expected).max()
    assert 1e-6 * change < np.abs(received - expected).max() < 1e-2 * change
