"""Ctrl-C as an event: the first one calls a function, the next one interrupts as usual."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class Interrupts:
    """A context manager that catches the first Ctrl-C in it; outside of the main thread it does nothing."""

    def __init__(self) -> None:
        self._is_set = False
        self._call: Callable[[], None] | None = None
        self._before: Callable[[int, FrameType | None], object] | int | None = None

    @property
    def is_set(self) -> bool:
        """Whether there has been one."""
        return self._is_set

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def call(self, function: Callable[[], None]) -> None:
        """Call ``function`` at the first Ctrl-C; at once if there has been one."""
        self._call = function
        if self._is_set:
            function()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_set:
            raise KeyboardInterrupt
        self._is_set = True
        if self._call is not None:
            self._call()
