"""Evaluation beside the training: its curve, the best weights, and an early end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import Trainer

_PREFIX = "eval_"
# Rows of an evaluation beside the training, at most: the curve is for a look, and each point takes time.
MOST_ROWS = 200


def spread(count: int, most: int = MOST_ROWS) -> list[int]:
    """Numbers of at most so many of ``count`` rows, evenly apart: files are often sorted by label."""
    return sorted({index * count // most for index in range(most)}) if count > most else list(range(count))


class BestWeights(nn.Module):
    """The weights with the lowest loss, as buffers of the module that is trained: so checkpoints hold them."""

    step: torch.Tensor
    loss: torch.Tensor

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._trained = list(parameters)
        for number, parameter in enumerate(self._trained):
            self.register_buffer(f"weight{number}", parameter.detach().clone())
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("loss", torch.tensor(math.inf, dtype=torch.float64))

    @torch.no_grad()
    def keep_if_better(self, loss: float, step: int) -> None:
        """Keep the weights of now, if this loss is the lowest so far."""
        if loss < float(self.loss):
            self.loss.fill_(loss)
            self.step.fill_(step)
            for number, parameter in enumerate(self._trained):
                self.get_buffer(f"weight{number}").copy_(parameter)

    def is_over(self, history: Iterable[dict[str, Any]], patience: int) -> bool:
        """Whether a Trainer's log has as many evaluations after the best one as ``patience``."""
        return len([point for point in eval_curve(history) if point["step"] > int(self.step)]) >= patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights in the place of those of now; nothing where there was no evaluation."""
        for number, parameter in enumerate(self._trained):
            parameter.copy_(self.get_buffer(f"weight{number}"))


class EvalCurve(TrainerCallback):  # type: ignore[misc]  # transformers has no types for it
    """Measures every so many steps, and at the last one; ends the run when its patience is over.

    It uses no random numbers, so that the adapter is the same with it and without.
    """

    def __init__(
        self,
        trainer: Trainer,
        measure: Callable[[], dict[str, float]],
        every: int,
        best: BestWeights | None,
        patience: int | None,
    ) -> None:
        """Measure with ``measure``, which gives a ``loss`` and perhaps more; ``best`` and ``patience`` go together."""
        self._trainer, self._measure, self._every = trainer, measure, every
        self._best, self._patience = best, patience

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Called by the Trainer."""
        step = state.global_step
        if step % self._every and step != args.max_steps:
            return
        measured, is_logged = self._measure(), control.should_log
        self._trainer.log({f"{_PREFIX}{name}": value for name, value in measured.items()})
        control.should_log = is_logged  # a log of our own resets it, and the training loss of this step is still due
        if self._best is None or self._patience is None:
            return
        self._best.keep_if_better(measured["loss"], step)
        control.should_training_stop |= self._best.is_over(state.log_history, self._patience)


def eval_curve(history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of the curve in a Trainer's log: the step, the loss and perhaps more."""
    return [
        {"step": entry["step"]}
        | {
            name.removeprefix(_PREFIX): value if math.isfinite(value) else None
            for name, value in entry.items()
            if name.startswith(_PREFIX)
        }
        for entry in history
        if f"{_PREFIX}loss" in entry
    ]
