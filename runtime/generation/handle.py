"""Handle of a submitted request: its text as it comes, its result, and a way to cancel it."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from adalink.runtime.generation.sequence import Generation, TokenLogprobs
from adalink.runtime.logs import get_logger

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class TextPiece:
    """New text of a request, in order.

    Attributes:
        text: the text; may be empty where a token ends no character.
        token_ids: the tokens generated since the last piece.
        logprobs: one entry for each of them, if the request asked for it.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


class Handle:
    """A submitted request, for any number of threads and event loops.

    Iterating gives each ``TextPiece`` once, ``async for`` too. A failed request raises its error there and in
    ``result``.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._pieces: deque[TextPiece] = deque()
        self._generation: Generation | None = None
        self._error: BaseException | None = None
        self._listeners: list[Callable[[], None]] = []
        self._is_cancelled = False

    @property
    def is_done(self) -> bool:
        """Whether it has ended: finished, failed or cancelled."""
        return self._generation is not None or self._error is not None

    @property
    def has_pieces(self) -> bool:
        """Whether ``take`` has a piece."""
        return bool(self._pieces)

    @property
    def is_failed(self) -> bool:
        """Whether it has ended with an error."""
        return self._error is not None

    @property
    def is_cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._is_cancelled

    def cancel(self) -> None:
        """End the request at the next step; its result is then what was generated, ``finish_reason`` "cancelled"."""
        self._is_cancelled = True

    def result(self, timeout: float | None = None) -> Generation:
        """Wait for the end.

        Args:
            timeout: seconds to wait; the request itself goes on.

        Raises:
            TimeoutError: it has not ended yet.
            RequestTimeoutError: its deadline has passed.
            BackendError: the engine refused, or its logits are not numbers.
            RequestError: it cannot be answered, or the deployment was closed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_done, timeout):
                raise TimeoutError(f"the request has not ended after {timeout} s: wait longer, or cancel it")
        if self._error is not None:
            raise self._error
        assert self._generation is not None
        return self._generation

    def __iter__(self) -> Iterator[TextPiece]:
        return self

    def __next__(self) -> TextPiece:
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self.is_done)
        piece = self.take()
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> AsyncIterator[TextPiece]:
        return self

    async def __anext__(self) -> TextPiece:
        loop, wake = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            loop.call_soon_threadsafe(wake.set)

        self.listen(notify)
        try:
            while not self._pieces and not self.is_done:
                await wake.wait()
                wake.clear()
        finally:
            with self._changed:
                self._listeners = [listener for listener in self._listeners if listener is not notify]
        piece = self.take()
        if piece is None:
            raise StopAsyncIteration
        return piece

    def listen(self, notify: Callable[[], None]) -> None:
        """Call ``notify``, in the thread that generates, at each piece and at the end; at once if there is one."""
        with self._changed:
            if not self.is_done:
                self._listeners.append(notify)
            is_late = bool(self._pieces) or self.is_done
        if is_late:
            notify()

    def take(self) -> TextPiece | None:
        """The next piece, if there is one now; ``None`` otherwise. Raises the request's error after the last."""
        with self._changed:
            if self._pieces:
                return self._pieces.popleft()
        if self._error is not None:
            raise self._error
        return None

    def push(self, piece: TextPiece) -> None:
        """Add text; for the scheduler."""
        self._tell(lambda: self._pieces.append(piece))

    def finish(self, generation: Generation) -> None:
        """End it with its result, unless it has ended; for the scheduler."""
        self._tell(lambda: self._end(generation, None))

    def fail(self, error: BaseException) -> None:
        """End it with an error, unless it has ended; for the scheduler."""
        self._tell(lambda: self._end(None, error))

    def _end(self, generation: Generation | None, error: BaseException | None) -> None:
        if not self.is_done:
            self._generation, self._error = generation, error

    def _tell(self, change: Callable[[], None]) -> None:
        """Make a change, and wake whoever waits."""
        with self._changed:
            change()
            self._changed.notify_all()
            listeners = tuple(self._listeners)
            if self.is_done:  # they may hold this handle
                self._listeners = []
        for notify in listeners:
            try:
                notify()
            except Exception as error:  # such as a closed event loop: whoever listened has gone, the others go on
                _LOG.debug("a listener of a request failed: %s", error)
