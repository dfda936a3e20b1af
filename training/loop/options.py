"""Options of a training loop, which change neither the adapter nor the report: what it calls, and where curves go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from types import TracebackType

    from transformers import TrainerCallback

    from adalink.training.outcome import Outcome

REPORTERS = ("none", "tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Options of a training run that change neither the adapter nor the report.

    Attributes:
        resume: resume from the last trial or checkpoint of an interrupted run with the same settings.
        callbacks: additional Trainer callbacks.
        progress: callback, called with one line per part of the run.
        show_bar: whether the Trainer draws a progress bar.
        on_step: callback, called after each step.
        stop: entered for the steps; once it is set, the run saves a checkpoint after the step, and is interrupted.
        report_to: one of ``REPORTERS``: where the Trainer sends its curves. TensorBoard's files are in ``OUT.logs``.
        extra_files: makes more files for the adapter folder, by name.
    """

    resume: bool = False
    callbacks: Sequence[TrainerCallback] = ()
    progress: Callable[[str], None] = lambda line: None
    show_bar: bool = True
    on_step: Callable[[StepProgress], None] | None = None
    stop: Stop | None = None
    report_to: str = "none"
    extra_files: Callable[[Outcome], Mapping[str, bytes]] = lambda outcome: {}


class Stop(Protocol):
    """A context manager that tells whether a run is asked to stop."""

    @property
    def is_set(self) -> bool:
        """Whether it is."""
        ...

    def __enter__(self) -> object:
        """Begin to listen."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """End it."""
        ...


@dataclass(frozen=True)
class StepProgress:
    """Where a run is.

    Attributes:
        step: steps done.
        steps: steps in all.
        loss: the last mean training loss; ``None`` before the first.
        evaluation: the last point of the evaluation curve, by name; empty before the first.
        seconds_left: by the mean step of this process.
    """

    step: int
    steps: int
    loss: float | None
    evaluation: Mapping[str, float]
    seconds_left: float
