"""Progress of a training: one line that is written over on a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING

from adalink.tools.terminal.verbose import is_quiet, say

if TYPE_CHECKING:
    from adalink.training.loop.options import StepProgress

_SECONDS_BETWEEN = 0.1


class StepLine:
    """The line of one run, on stderr."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty() and not is_quiet()
        self._is_open = False
        self._shown_at, self._shown = 0.0, ""

    def show(self, progress: StepProgress) -> None:
        """Show where the run is; elsewhere than on a terminal only if a figure is new, or the run is done."""
        is_done = progress.step == progress.steps
        if not self._is_terminal:
            figures = _figures(progress)
            if figures != self._shown or is_done:
                self._shown = figures
                say(describe(progress))
            return
        now = time.monotonic()
        if now - self._shown_at < _SECONDS_BETWEEN and not is_done:
            return
        self._shown_at, self._is_open = now, True
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r{describe(progress)[:width]:<{width}}")
        sys.stderr.flush()

    def close(self) -> None:
        """End the line that is written over, so that others may follow."""
        if self._is_open:
            sys.stderr.write("\n")
            self._is_open = False

    def say(self, message: str) -> None:
        """Print a line of its own."""
        self.close()
        say(message)


def describe(progress: StepProgress) -> str:
    """Where a run is, in words."""
    parts = [f"step {progress.step} of {progress.steps}"]
    if figures := _figures(progress):
        parts.append(figures)
    if progress.step < progress.steps:
        parts.append(f"{_time(progress.seconds_left)} left")
    return ", ".join(parts)


def _figures(progress: StepProgress) -> str:
    loss = [] if progress.loss is None else [f"loss {progress.loss:.4g}"]
    measured = [f"eval {name.replace('_', ' ')} {value:.4g}" for name, value in progress.evaluation.items()]
    return ", ".join(loss + measured)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
