"""Step (h): many configurations of the full study as rows of one batch over a shared base, which is frozen.

Adapters act on embeddings alone. So one pass through the base serves all configurations: each has rows of its own, its
own adapter and its own learning rate, and learns what it would learn alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from adalink.training.method.adalink import AdaLink
from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.step import Plan
from benchmarks.process import REPOSITORY

_ROWS, _TOKENS, _STEPS, _WARM, _COMPARED = 16, 64, 20, 2, 3
_SMALL_ROWS, _SMALL_TOKENS, _SMALL_STEPS, _SMALL_CELLS = 2, 12, 3, 4
# Positions at the end of a row that are learned, as a study learns labels: logits of all would fill a GPU.
_KEPT = 8
_STUDY = REPOSITORY / "studies" / "files" / "full.toml"


@dataclass(frozen=True)
class Cell:
    """One configuration."""

    name: str
    rank: int
    activation: str
    lr: float


def run(record: Record, plan: Plan) -> None:
    """All at once, then some of them alone: the same losses, and the time of a step of each."""
    from transformers import AutoModelForCausalLM

    place = "cuda" if plan.has_gpu else "cpu"
    base: Any = AutoModelForCausalLM.from_pretrained(plan.small, dtype=torch.float32)
    base = base.to(place).eval()
    base.requires_grad_(False)
    cells = study_cells()[: None if plan.is_full else _SMALL_CELLS]
    rows, tokens, steps = (_ROWS, _TOKENS, _STEPS) if plan.is_full else (_SMALL_ROWS, _SMALL_TOKENS, _SMALL_STEPS)
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(3, base.config.vocab_size, (len(cells), rows, tokens), generator=generator).to(place)
    record.figure("cells", [cell.name for cell in cells])
    while True:
        try:
            losses, seconds = train_cells(base, cells, range(len(cells)), ids, steps)
            break
        except torch.OutOfMemoryError:
            if len(cells) == 1:
                raise
            cells, ids = cells[: len(cells) // 2], ids[: len(cells) // 2]
        torch.cuda.empty_cache()
    record.figures({"at_once": len(cells), "batch_rows": len(cells) * rows, "step_seconds_together": seconds})
    chosen = [0, len(cells) // 2, len(cells) - 1][:_COMPARED]
    alone = {index: train_cells(base, [cells[index]], [index], ids[index : index + 1], steps) for index in chosen}
    deviation = max(abs(losses[index] - alone[index][0][0]) for index in chosen)
    seconds_alone = sum(result[1] for result in alone.values()) / len(alone)
    record.figures(
        {
            "step_seconds_alone": seconds_alone,
            "gain": len(cells) * seconds_alone / seconds,
            "largest_loss_deviation": deviation,
            "last_losses": {cells[index].name: losses[index] for index in chosen},
        }
    )
    record.target("deviation of a loss from the configuration's own run", deviation, 1e-3)


def study_cells() -> list[Cell]:
    """AdaLink's configurations of the full study without soft prompts, one for each learning rate."""
    from studies.experiment.settings import AdaLinkMethod, read_study

    methods = [method for method in read_study(_STUDY).methods if isinstance(method, AdaLinkMethod)]
    return [
        Cell(f"{method.name}, {lr:g}", method.rank, method.activation, lr)
        for method in methods
        if not method.tokens and method.init == "kaiming"
        for lr in method.lr
    ]


def train_cells(base: Any, cells: list[Cell], seeds: Any, ids: Any, steps: int) -> tuple[list[float], float]:
    """Train configurations together; their last losses, and the median seconds of a step.

    Args:
        base: the frozen base.
        cells: the configurations.
        seeds: seed of each one's first weights.
        ids: int64 with shape ``(cells, rows, tokens)``.
        steps: how many.
    """
    adapters = []
    for cell, seed in zip(cells, seeds, strict=True):
        torch.manual_seed(seed)
        adapters.append(AdaLink(base.config.hidden_size, cell.rank, cell.activation).to(ids.device))
    groups = [{"params": adapter.parameters(), "lr": cell.lr} for adapter, cell in zip(adapters, cells, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    table, times, losses = base.get_input_embeddings(), [], torch.zeros(len(cells))
    for number in range(_WARM + steps):
        begun = time.perf_counter()
        embeds = torch.cat([adapter(table(own)) for adapter, own in zip(adapters, ids, strict=True)])
        logits = base(inputs_embeds=embeds, use_cache=False, logits_to_keep=_KEPT + 1).logits[:, :-1]
        targets = ids.flatten(0, 1)[:, -_KEPT:]
        each = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        means = each.view(*ids.shape[:2], -1).mean(dim=(1, 2))
        torch.autograd.backward(means.sum())
        optimizer.step()
        optimizer.zero_grad()
        losses = means.detach().cpu()  # waits for the GPU
        if number >= _WARM:
            times.append(time.perf_counter() - begun)
    return losses.tolist(), sorted(times)[len(times) // 2] if times else 0.0
