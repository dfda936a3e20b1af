"""Running choices: the handles of one HTTP request, awaited together and ended together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from adalink.runtime.generation.handle import Handle, TextPiece
from adalink.runtime.generation.sequence import Generation
from adalink.serving.api_error import ApiError


class RunningChoices:
    """Handles of one HTTP request, in the order of its choices; for one event loop.

    Attributes:
        error: why it was ended by the server, if it was.
        is_left: whether the client has gone.
    """

    def __init__(self, handles: Sequence[Handle], lap: Sequence[Callable[[], None]]) -> None:
        """Listen to handles.

        Args:
            handles: at least one.
            lap: for each handle, what is called at each of its tokens, in the thread that generates.
        """
        self.error: ApiError | None = None
        self.is_left = False
        self._handles = handles
        self._wake = asyncio.Event()
        self._wants_pieces = False
        self._loop = asyncio.get_running_loop()
        for handle, token_came in zip(handles, lap, strict=True):
            handle.listen(partial(self._notify, handle, token_came))

    def leave(self) -> None:
        """The client has gone: free its slots at the next step."""
        self.is_left = True
        self._cancel()

    def end(self, error: ApiError) -> None:
        """End them from the server's side; who waits for them gets ``error``."""
        self.error = self.error or error
        self._cancel()

    async def pieces(self) -> AsyncIterator[list[tuple[int, TextPiece]]]:
        """Pieces of all choices as they come, each with its choice's index.

        Raises:
            ApiError: the server has ended them.
            AdaLinkError: a choice failed; the others are cancelled.
        """
        left = set(range(len(self._handles)))
        self._wants_pieces = True
        self._wake.set()  # what came before has woken nobody
        while left:
            await self._wake.wait()
            self._wake.clear()
            pieces = []
            for index in sorted(left):
                handle = self._handles[index]
                is_done = handle.is_done  # before its last pieces are taken
                while (piece := self._take(handle)) is not None:
                    pieces.append((index, piece))
                if is_done:
                    left.discard(index)
            self._check()
            if pieces:
                yield pieces

    async def results(self) -> list[Generation]:
        """What all choices generated, once all have ended; raises as ``pieces``."""
        while not all(handle.is_done for handle in self._handles):
            if any(handle.is_failed for handle in self._handles):
                break
            await self._wake.wait()
            self._wake.clear()
        self._check()
        try:
            return [handle.result(0) for handle in self._handles]
        except BaseException:
            self._cancel()
            raise

    def _take(self, handle: Handle) -> TextPiece | None:
        try:
            return handle.take()
        except BaseException:
            self._cancel()
            raise

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _cancel(self) -> None:
        for handle in self._handles:
            handle.cancel()

    def _notify(self, handle: Handle, token_came: Callable[[], None]) -> None:
        """In the thread that generates, so nothing may fail here."""
        is_done = handle.is_done
        if not is_done:
            token_came()
            if not self._wants_pieces:
                return
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:  # the loop is closed: nobody waits any more
            handle.cancel()
