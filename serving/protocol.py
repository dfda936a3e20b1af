"""HTTP/1.1 connections of uvicorn, with a deadline for headers and no traceback for what a client sends."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def make_protocol(header_seconds: float) -> type[asyncio.Protocol]:
    """The class of the connections.

    Args:
        header_seconds: most seconds from the first byte of a request, or the opening of a connection, to the end of
            the request's headers.
    """

    class Connection(H11Protocol):
        """A connection."""

        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            self._set_deadline()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unset_deadline()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._deadline is None and self.conn.their_state is h11.IDLE:
                self._set_deadline()
            super().data_received(data)

        def handle_events(self) -> None:
            try:
                super().handle_events()
            except h11.LocalProtocolError:  # the answer to a broken request cannot be sent any more
                self.transport.close()
            if self.conn.their_state is not h11.IDLE:
                self._unset_deadline()

        def _set_deadline(self) -> None:
            self._deadline = self.loop.call_later(header_seconds, self.transport.close)

        def _unset_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Connection


def h11_settings(header_seconds: float, header_bytes: int) -> dict[str, Any]:
    """Settings of ``uvicorn.Config`` for such connections."""
    return {"http": make_protocol(header_seconds), "h11_max_incomplete_event_size": header_bytes}
