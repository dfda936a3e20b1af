"""What is called after each step of a run: progress, and the end on request."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from adalink.training.loop.eval_curve import eval_curve
from adalink.training.loop.options import StepProgress

if TYPE_CHECKING:
    from adalink.training.loop.options import Stop


class StepReporter(TrainerCallback):  # type: ignore[misc]  # transformers has no types for it
    """Tells where the run is."""

    def __init__(self, on_step: Callable[[StepProgress], None]) -> None:
        self._on_step = on_step
        self._start, self._first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Called by the Trainer."""
        self._start, self._first = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Called by the Trainer."""
        step, steps = state.global_step, args.max_steps
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        points = eval_curve(state.log_history)
        mean = (time.monotonic() - self._start) / max(1, step - self._first)
        point = points[-1] if points else {}
        measured = {name: math.nan if value is None else value for name, value in point.items() if name != "step"}
        self._on_step(StepProgress(step, steps, losses[-1] if losses else None, measured, mean * (steps - step)))


class StopAfterStep(TrainerCallback):  # type: ignore[misc]  # as above
    """Saves a checkpoint and ends the run after the step in which it is asked to."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self.has_stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Called by the Trainer."""
        if self._stop.is_set:
            control.should_save = control.should_training_stop = self.has_stopped = True
