"""Logits of a deployment against PyTorch, on the same GPU where there is one, within the limits of ``verify``."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from adalink.runtime.deployment import Deployment
from adalink.tools.parity.reference.noise_floor import TYPICAL_PERCENTILE, limit_of
from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.step import Plan

_TOKENS = 128


def compare_with_pytorch(record: Record, plan: Plan, deployment: Deployment, against: Path) -> None:
    """The base and two tasks on a few prompts; the limit grows with the noise of float32, and with the dtype."""
    import torch

    from adalink.tools.parity.inputs.prompts import choose_prompts
    from adalink.training.models.loading import load_base

    place = "cuda" if plan.has_gpu and torch.cuda.is_available() else "cpu"
    model: Any = load_base(against)
    model = model.to(place)
    models = model, copy.deepcopy(model).double()
    rows = [deployment.tokenizer.encode(text)[:_TOKENS] for text in choose_prompts(quick=True)]
    found: dict[str, object] = {"reference": f"PyTorch {torch.__version__}, float32 and float64, {place}"}
    worst = 0.0
    for task in (None, *deployment.tasks[:2]):
        received = [deployment.run(input_ids=[ids], tasks=task)["logits"][0].astype(np.float64) for ids in rows]
        single, double = (_logits(model, deployment, task, rows, place) for model in models)
        share, figures = _judge(received, single, double, deployment.manifest.base.embedding_dtype)
        found[task or "base"] = figures
        worst = max(worst, share)
    record.figure("pytorch", found)
    record.target("deviation from PyTorch, as a share of its limit", worst, 1.0)


def _judge(received: list[Any], single: list[Any], double: list[Any], dtype: str) -> tuple[float, dict[str, object]]:
    ours, theirs = np.concatenate(received), np.concatenate(single)
    noise = np.abs(theirs - np.concatenate(double)).max(axis=1)
    typical = float(np.percentile(noise, TYPICAL_PERCENTILE))
    deviation = np.abs(ours - theirs).max(axis=1)
    share = float(np.max(deviation / limit_of(noise, typical, dtype)))
    if not np.isfinite(ours).all():
        share = float("inf")
    return share, {
        "share_of_limit": share,
        "largest_deviation": float(deviation.max()),
        "typical_noise": typical,
        "top1_agreeing": int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum()),
        "positions": len(ours),
    }


def _logits(model: Any, deployment: Deployment, task: str | None, rows: list[list[int]], place: str) -> list[Any]:
    import torch

    from adalink.training.adapter_io import load_adapter

    with ExitStack() as stack:
        if task is not None:
            folder = (deployment.path / deployment.manifest.tasks[task].config).parent
            stack.enter_context(load_adapter(folder, model))
        stack.enter_context(torch.no_grad())
        results = [model(input_ids=torch.tensor([ids], device=place)).logits[0] for ids in rows]
    return [result.double().cpu().numpy() for result in results]
