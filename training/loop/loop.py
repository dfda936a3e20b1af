"""What every training run does, whatever it learns: its checkpoints, its steps, and its adapter folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback

from adalink.runtime.errors import AdapterError, ModelError
from adalink.training.adapter_io import save_adapter, to_adapter
from adalink.training.device import precision_warning, resolve_device
from adalink.training.loop.checkpoints import (
    CheckpointTrainer,
    begin_checkpoints,
    last_checkpoint,
    removed_if_useless,
    restore,
    step_of,
)
from adalink.training.loop.eval_curve import BestWeights, EvalCurve, eval_curve
from adalink.training.loop.options import LoopOptions
from adalink.training.loop.reporters import check_reporter, make_reporters, run_of_its_own
from adalink.training.loop.step_callbacks import StepReporter, StopAfterStep
from adalink.training.loop.trainer import trainer_arguments
from adalink.training.model_card import CARD_FILE, make_card
from adalink.training.models.source import display_name
from adalink.training.outcome import ClassifiedRows, Outcome, RepliedRows
from adalink.training.run_folder import check_fresh, check_target, checkpoints_of
from adalink.training.settings import TrainSettings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from adalink.runtime.storage.adapter import Adapter
    from adalink.training.method.attach import AdaLinkModel

REPORT_FILE = "training.json"
History = list[dict[str, Any]]


@dataclass(frozen=True)
class Lesson:
    """What is learned, and how it is measured beside.

    Attributes:
        module: adapters, and perhaps a head, whose forward pass computes the loss.
        examples: encoded rows.
        collate: makes batches of them.
        measure: gives the loss, and perhaps more, on rows that are not learned.
        optimizer: an optimizer; AdamW with the settings' rate by default.
    """

    module: nn.Module
    examples: Sequence[Any]
    collate: Callable[[Any], dict[str, torch.Tensor]]
    measure: Callable[[], dict[str, float]]
    optimizer: torch.optim.Optimizer | None = None


class TrainingRun:
    """A run on its way: from the target folder's name to the folder."""

    def __init__(self, base: str | Path, out: str | Path, settings: TrainSettings, loop: LoopOptions) -> None:
        """Check what can be checked before anything is read.

        Raises:
            AdaLinkError: the target is no place for an adapter, there is no GPU, or a package is missing.
        """
        check_reporter(loop.report_to)
        self.out = Path(out).resolve()  # "x/.." has no name of its own, and nothing beside it
        check_target(self.out)
        if warning := precision_warning(resolve_device(settings.device), settings.precision):
            loop.progress(warning)
        self.base = display_name(base)
        self.checkpoints = checkpoints_of(self.out)
        self._loop = loop
        self._record: dict[str, Any] = {}
        self._start = time.perf_counter()
        self._best_step: int | None = None
        self.last: Path | None = None

    def find_checkpoint(self, record: dict[str, Any]) -> None:
        """Find where to go on, or check that nothing is in the way; raises ``ConfigError``.

        Args:
            record: all that decides the adapter.
        """
        self._record = record
        if self._loop.resume:
            self.last = last_checkpoint(self.checkpoints, record)
        else:
            check_fresh(self.checkpoints)

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Make the checkpoint folder; an error in the block removes it, unless it helps. Raises ``WriteError``."""
        if not self._loop.resume:
            begin_checkpoints(self.checkpoints, self._record)
        self._start = time.perf_counter()
        with removed_if_useless(self.checkpoints):
            yield

    def train(self, lesson: Lesson, settings: TrainSettings) -> History:
        """Train to the end, from the last checkpoint if there is one; returns the Trainer's log.

        Raises:
            WriteError: a checkpoint cannot be written.
            KeyboardInterrupt: the run was asked to stop; a checkpoint is saved.
        """
        module, best, loop, patience = lesson.module, None, self._loop, settings.early_stopping
        if patience is not None:
            module.best = best = BestWeights(module.parameters())
        history = [] if self.last is None else restore(module, self.last)
        is_over = self.last is not None and step_of(self.last) == settings.max_steps
        if best is not None and patience is not None:
            is_over |= best.is_over(history, patience)
        if not is_over:  # else the Trainer would go one step further
            trainer = CheckpointTrainer(
                model=module,
                args=trainer_arguments(
                    self.checkpoints,
                    settings,
                    save_steps=settings.save_steps,
                    save_total_limit=2,
                    disable_tqdm=not loop.show_bar,
                ),
                train_dataset=lesson.examples,
                data_collator=lesson.collate,
                callbacks=make_reporters(loop.report_to, self.out.parent / f"{self.out.name}.logs"),
                optimizers=(lesson.optimizer, None),
            )
            trainer.remove_callback(PrinterCallback)  # without a bar it prints dicts
            if settings.curve_steps:
                trainer.add_callback(EvalCurve(trainer, lesson.measure, settings.curve_steps, best, patience))
            self._run(trainer)
            history = trainer.state.log_history
        if best is not None:
            if not int(best.step):
                shutil.rmtree(self.checkpoints)  # nothing can be resumed
                raise ModelError("no evaluation had a finite loss: train again with a lower rate")
            best.restore()
            loop.progress(f"best of all evaluations: step {int(best.step)}, loss {float(best.loss):.4g}")
            self._best_step = int(best.step)
        return history

    def _run(self, trainer: CheckpointTrainer) -> None:
        loop, stopper = self._loop, None
        if loop.on_step is not None:
            trainer.add_callback(StepReporter(loop.on_step))
        with loop.stop or contextlib.nullcontext(), run_of_its_own(loop.report_to):
            if loop.stop is not None:
                trainer.add_callback(stopper := StopAfterStep(loop.stop))
            for callback in loop.callbacks:
                trainer.add_callback(callback)
            trainer.train(resume_from_checkpoint=None if self.last is None else str(self.last))
        if stopper is not None and stopper.has_stopped:
            raise KeyboardInterrupt

    def make_adapter(self, attached: AdaLinkModel, tokenizer: PreTrainedTokenizerBase) -> Adapter:
        """The adapter as it is now; raises ``AdapterError`` if it diverged, and nothing can be resumed."""
        attached.adapters.eval()
        try:
            return to_adapter(attached, self.base, tokenizer)
        except AdapterError:
            shutil.rmtree(self.checkpoints)
            raise

    def finish(
        self, adapter: Adapter, history: History, parts: dict[str, Any], answers: RepliedRows | ClassifiedRows
    ) -> dict[str, Any]:
        """Write the adapter folder, remove the checkpoints, and return the report.

        Args:
            adapter: the adapter.
            history: the Trainer's log.
            parts: more of the report, which replaces what was recorded at the start.
            answers: answers to the eval rows.
        """
        report = {"kit_version": version("adalink-kit"), **self._record, "adapter_digest": adapter.digest}
        report["loss_curve"] = [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry]
        if curve := eval_curve(history):
            report["eval_curve"] = curve
        if self._best_step is not None:
            report["best_step"] = self._best_step
        report |= {**parts, "wall_seconds": round(time.perf_counter() - self._start, 1)}
        outcome = Outcome(self.out.name, report, answers)
        files = {
            REPORT_FILE: (json.dumps(report, indent=2) + "\n").encode(),
            CARD_FILE: make_card(outcome, adapter.config).encode(),
            **self._loop.extra_files(outcome),
        }
        save_adapter(self.out, adapter, files)
        shutil.rmtree(self.checkpoints)
        return report
