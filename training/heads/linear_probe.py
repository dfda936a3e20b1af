"""A linear probe: the head that suits the unchanged base's states best, from which the training then starts.

So a run does not spend its steps on the head (linear probing, then fine-tuning: arXiv 2202.10054).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION
from adalink.training.data.batches import IGNORED_LABEL
from adalink.training.heads.classifier import features
from adalink.training.loop.trainer import batches

if TYPE_CHECKING:
    from adalink.training.heads.classifier import LabelCollator, LabelledExample, TrainableClassifier
    from adalink.training.settings import TrainSettings

# scikit-learn's C of vectors with mean length 1: the middle of the strengths that serve embeddings of sentences well.
STRENGTH = 10.0
# States that are fitted at most, which bounds the memory: texts, or tokens of texts.
MAX_STATES = 20_000
_MAX_ITERATIONS = 200


def fit_head(
    module: TrainableClassifier, examples: Sequence[LabelledExample], collate: LabelCollator, settings: TrainSettings
) -> None:
    """Give a head the weights that a regression on the states of rows finds; the adapter is left as it is.

    The objective is scikit-learn's for ``LogisticRegression``: the sum of the rows' losses, plus the squared weights
    over twice ``STRENGTH``, with states scaled to mean length 1. No more rows are read than the run's steps read.

    Args:
        module: adapters and head, which is changed.
        examples: training rows, a regression's with their numbers scaled.
        collate: makes batches of them.
        settings: steps, rows a batch, and the seed that draws rows where there are too many.
    """
    states, targets = _states(module, _drawn(examples, settings), collate, settings.batch_size)
    length = states.norm(dim=1).mean()
    weight, bias = _fit(states / length, targets, module.spec.problem_type, len(module.head.bias))
    with torch.no_grad():
        module.head.weight.copy_(weight / length)
        module.head.bias.copy_(bias)


def _drawn(examples: Sequence[LabelledExample], settings: TrainSettings) -> list[LabelledExample]:
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    return [examples[number] for number in order[: settings.max_steps * settings.batch_size]]


def _states(
    module: TrainableClassifier, examples: Sequence[LabelledExample], collate: LabelCollator, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 states ``(n, d)`` on the CPU, and the target of each."""
    module.eval()
    states, targets, count = [], [], 0
    for batch in batches(examples, collate, batch_size, module.head.weight.device):
        wanted = batch.pop("labels").cpu()
        with torch.no_grad():
            found = features(module.attached.model, module.spec, **batch).double().cpu()
        if found.ndim == 3:  # of tokens
            is_tagged = wanted != IGNORED_LABEL
            found, wanted = found[is_tagged], wanted[is_tagged]
        states.append(found)
        targets.append(wanted)
        count += len(found)
        if count >= MAX_STATES:
            break
    return torch.cat(states), torch.cat(targets)


def _fit(states: torch.Tensor, targets: torch.Tensor, kind: str, scores: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight ``(scores, d)`` and bias ``(scores,)`` by L-BFGS, from zeros."""
    weight = torch.zeros(scores, states.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(scores, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        search.zero_grad()
        values = functional.linear(states, weight, bias)
        if kind == REGRESSION:
            losses = functional.mse_loss(values[:, 0], targets.double(), reduction="sum") / 2
        elif kind == MULTI_LABEL:
            losses = functional.binary_cross_entropy_with_logits(values, targets.double(), reduction="sum")
        else:
            losses = functional.cross_entropy(values, targets, reduction="sum")
        total: torch.Tensor = (losses + (weight * weight).sum() / (2 * STRENGTH)) / len(states)
        total.backward()  # type: ignore[no-untyped-call]
        return total

    search.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
