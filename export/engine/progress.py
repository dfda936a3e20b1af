"""Progress of a build: TensorRT's phases and steps as one line and one fraction."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

# Called with the current step and the fraction done, 0 to 1 or ``None`` where that is not known.
EngineProgress = Callable[[str, float | None], None]
_SECONDS_BETWEEN = 0.2


class Phases:
    """Nested phases, each of a number of steps."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str | None, int, int]] = {}

    def begin(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        self._open[name] = (parent, 0, max(steps, 1))

    def step(self, name: str, number: int) -> None:
        """A step, counted from 0, is done."""
        if name in self._open:
            parent, _, steps = self._open[name]
            self._open[name] = (parent, min(number + 1, steps), steps)

    def end(self, name: str) -> None:
        """A phase ends."""
        self._open.pop(name, None)

    def now(self) -> tuple[str, float]:
        """The innermost phase, and the fraction done of the outermost one."""
        fraction = 0.0
        for _, done, steps in reversed(self._open.values()):
            fraction = min((done + fraction) / steps, 1.0)
        return next(reversed(self._open), ""), fraction


def make_monitor(module: Any, plan: str, progress: EngineProgress) -> Any:
    """A progress monitor for the builder of ``plan``, safe for calls from the library's threads.

    An error raised in ``progress``, or Ctrl-C, stops the build. No exception may pass through the library, so
    ``raise_what_stopped_it`` raises it afterwards.
    """

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._phases = Phases()
            self._lock = threading.Lock()
            self._last = -_SECONDS_BETWEEN
            self._stopped_by: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._note(lambda: self._phases.begin(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._note(lambda: self._phases.step(phase_name, step))
            return self._stopped_by is None

        def phase_finish(self, phase_name: str) -> None:
            self._note(lambda: self._phases.end(phase_name))

        def raise_what_stopped_it(self) -> None:
            if self._stopped_by is not None:
                raise self._stopped_by

        def _note(self, change: Callable[[], None]) -> None:
            try:
                with self._lock:
                    change()
                    now = time.monotonic()
                    if now - self._last < _SECONDS_BETWEEN or self._stopped_by is not None:
                        return
                    self._last = now
                    phase, fraction = self._phases.now()
                progress(f"building {plan}: {phase}" if phase else f"building {plan}", fraction)
            except BaseException as error:  # kept, and raised when the library has returned
                self._stopped_by = error

    return Monitor()
