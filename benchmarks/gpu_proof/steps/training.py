"""Step (g): AdaLink, prefix and LoRA on one base in bfloat16: steps a second and memory; then ``adalink train``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.step import Plan

_ROWS, _TOKENS, _STEPS, _WARM = 16, 256, 30, 3
_SMALL_ROWS, _SMALL_TOKENS, _SMALL_STEPS = 2, 16, 2
_RANK, _PREFIX, _LORA = 64, 16, 8
_LR = 1e-3


def run(record: Record, plan: Plan) -> None:
    """Each method on the same base, one after another."""
    from transformers import AutoModelForCausalLM

    place = "cuda" if plan.has_gpu else "cpu"
    base: Any = AutoModelForCausalLM.from_pretrained(plan.large, dtype=torch.bfloat16)
    base = base.to(place).train()
    base.requires_grad_(False)
    rows, tokens = (_ROWS, _TOKENS) if plan.is_full else (_SMALL_ROWS, _SMALL_TOKENS)
    ids = torch.randint(3, base.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(5)).to(place)
    record.figure("batch", {"rows": rows, "tokens": tokens, "precision": "bfloat16", "base": plan.large.name})
    for name, method in METHODS.items():
        with record.part(name), method(base) as (model, parameters):
            found = measure(plan, model, parameters, ids, 0.25)
            record.figures(found)
            record.target("last loss over the first", found["last_loss"] / found["first_loss"], 1.0)
    with record.part("adalink train"):
        record.figures(train_with_the_kit(plan))


def measure(plan: Plan, model: Any, parameters: list[Any], ids: Any, share: float) -> dict[str, Any]:
    """Steps a second after a warm-up, losses, and the peak of the GPU's memory."""
    optimizer = torch.optim.AdamW(parameters, lr=_LR)
    on_gpu = ids.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses, times, ends = [], [], time.monotonic() + share * plan.seconds_left
    for number in range(_WARM + (_STEPS if plan.is_full else _SMALL_STEPS)):
        begun = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))  # waits for the GPU
        if number >= _WARM:
            times.append(time.perf_counter() - begun)
        if len(times) >= 2 and time.monotonic() > ends:
            break
    median = sorted(times)[len(times) // 2]
    return {
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "steps": len(times),
        "steps_per_second": 1 / median,
        "tokens_per_second": ids.numel() / median,
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


@contextmanager
def _adalink(base: Any) -> Iterator[tuple[Any, list[Any]]]:
    with attach(base, AdaLinkConfig(rank=_RANK)) as attached:
        yield base, list(attached.parameters())


@contextmanager
def _prefix(base: Any) -> Iterator[tuple[Any, list[Any]]]:
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=_PREFIX))
    yield model, [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def _lora(base: Any) -> Iterator[tuple[Any, list[Any]]]:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=_LORA, target_modules="all-linear"))
    try:
        yield model, [parameter for parameter in model.parameters() if parameter.requires_grad]
    finally:
        model.unload()


METHODS: dict[str, Callable[[Any], Any]] = {
    f"AdaLink, rank {_RANK}": _adalink,
    f"prefix, {_PREFIX} positions": _prefix,
    f"LoRA, rank {_LORA}, all linear layers": _lora,
}


def train_with_the_kit(plan: Plan) -> dict[str, object]:
    """``adalink train`` on the small base: its own loop, Trainer, checkpoints and evaluation."""
    from adalink.training.loop.options import LoopOptions
    from adalink.training.run import train
    from adalink.training.settings import TrainSettings

    folder = plan.work / "trained"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"Number {number}. Even or odd?", "completion": " even" if number % 2 == 0 else " odd"}
            for number in range(64)]  # fmt: skip
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    steps = 40 if plan.is_full else 2
    settings = TrainSettings(
        max_steps=steps, batch_size=8, precision="bfloat16" if plan.has_gpu else "float32", save_steps=steps
    )
    begun = time.perf_counter()
    report = train(
        plan.small, data, data, folder / "adapter", AdaLinkConfig(rank=16), settings, loop=LoopOptions(show_bar=False)
    )
    report = {key: report[key] for key in report if key in ("evaluation", "exact_match", "train_seconds", "device")}
    return {"seconds": time.perf_counter() - begun, "steps": steps, "report": report}
