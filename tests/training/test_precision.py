"""Steps in bfloat16: the base's products alone are, and the adapter learns what it learns in float32."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.quick import slow_except
from helpers.studies import write_letter_task
from helpers.tiny_models import FAMILIES, idefics3, llava, paligemma, qwen2_5_vl
from helpers.tiny_tokenizer import make_prefix_tokenizer, make_tile_tokenizer, make_tokenizer
from helpers.vision import clip_processor, idefics3_processor, patch_processor, siglip_processor
from helpers.vision_deployments import write_rows
from torch import nn

from adalink.runtime.storage.adapter import read_adapter
from adalink.training.data.rows import TrainingRow
from adalink.training.loop.options import LoopOptions
from adalink.training.method.config import AdaLinkConfig
from adalink.training.run import train
from adalink.training.settings import TrainSettings

BASES = {
    "llama": (FAMILIES["llama"], make_tokenizer, None, "{}{}c"),
    "gemma3": (FAMILIES["gemma3"], make_tokenizer, None, "{}{}c"),
    "t5": (FAMILIES["t5"], make_tokenizer, None, "{}{}c"),
    "llava": (llava, make_tokenizer, clip_processor, "@ is {}"),
    "idefics3": (idefics3, make_tile_tokenizer, idefics3_processor, "<image> is {}"),
    "paligemma": (paligemma, make_prefix_tokenizer, siglip_processor, "{} is"),
    "qwen2.5": (qwen2_5_vl, make_tokenizer, patch_processor, "@ is {}"),
}
BFLOAT16, FLOAT32 = {torch.bfloat16}, {torch.float32}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[torch.dtype]]:
    """The dtypes that linear layers give: the base's in steps and while it is measured, and the adapter's in steps."""
    found: dict[str, set[torch.dtype]] = {"step": set(), "measuring": set(), "adapter": set()}
    forward = nn.Linear.forward

    def watched(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        y = forward(layer, x)
        is_adapter = layer.weight.requires_grad
        found["measuring" if not torch.is_grad_enabled() else "adapter" if is_adapter else "step"].add(y.dtype)
        return y

    monkeypatch.setattr(nn.Linear, "forward", watched)
    return found


@pytest.mark.parametrize("family", slow_except(BASES, "t5", "idefics3"))
def test_only_products_of_a_step_are(family: str, products: dict[str, set[torch.dtype]], tmp_path: Path) -> None:
    """The first loss has bfloat16's few digits, and the adapter's weights end where float32's do."""
    make_base, make_words, make_processor, prompt = BASES[family]
    for part in filter(None, (make_base, make_words, make_processor)):
        part().save_pretrained(tmp_path / "base")
    has_images = make_processor is not None
    rows = [
        TrainingRow(prompt.format(letter, letter), letter.upper(), images=(f"{index}.png",) if has_images else ())
        for index, letter in enumerate("abba")
    ]
    write_rows(tmp_path, rows, ((11, 40), (30, 33), (17, 9), (20, 20)) if has_images else ())
    config = AdaLinkConfig(rank=8, activation="gelu", modalities=("text", "image") if has_images else ("text",))

    def run(precision: str) -> tuple[float, dict[str, np.ndarray]]:
        settings = TrainSettings(
            lr=1e-3, max_steps=4, batch_size=4, max_length=128, seed=3, device="cpu", precision=precision
        )  # fmt: skip
        data, out = tmp_path / "rows.jsonl", tmp_path / "out"
        report = train(tmp_path / "base", data, data, out, config, settings)
        assert report["settings"]["precision"] == precision
        return report["loss_curve"][0]["loss"], read_adapter(out).weights

    loss, weights = run("bfloat16")
    assert products == {"step": BFLOAT16, "measuring": FLOAT32, "adapter": FLOAT32}
    products["step"].clear()
    exact, expected = run("float32")
    assert products["step"] == FLOAT32
    assert 0 < abs(loss - exact) < 0.01 * exact
    again = run("bfloat16")
    assert again[0] == loss
    for name, values in expected.items():
        assert values.dtype == weights[name].dtype == np.float32
        assert np.array_equal(again[1][name], weights[name])
        if "up" in name:  # from zero, so that all of it was learned
            a, b = values.ravel().astype(np.float64), weights[name].ravel().astype(np.float64)
            assert a @ b / math.sqrt((a @ a) * (b @ b)) > 0.9


@pytest.mark.parametrize("is_supported", slow_except([True, False], False))
def test_a_cpu_that_only_emulates_it_is_warned_of_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_supported: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_supported)
    files, lines = write_letter_task(tmp_path, "ab", range(2, 5)), list[str]()
    for precision in ("bfloat16", "float32"):
        settings = TrainSettings(max_steps=1, device="cpu", precision=precision)
        train(*files, tmp_path / precision, AdaLinkConfig(rank=4), settings, loop=LoopOptions(progress=lines.append))
    warned = [index for index, line in enumerate(lines) if "has no instructions for bfloat16" in line]
    assert warned == ([] if is_supported else [0])
