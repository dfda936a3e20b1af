"""HTTP/1.1 connections of uvicorn with limits: how many, how slow to send, how slow to read. No client's traceback."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from adalink.serving.api_error import ApiError
from adalink.serving.options import HEADER_BYTES, ServeOptions

_FULL = ApiError(503, "too many connections are open: try again later", code="too_many_connections")
# Time in which a refused client reads its answer.
_REFUSED_SECONDS = 1.0


def make_protocol(options: ServeOptions) -> type[asyncio.Protocol]:
    """The class of the connections.

    Args:
        options: ``header_seconds``, ``send_seconds`` and ``connections`` are used.
    """

    class Connection(H11Protocol):
        """A connection."""

        _headers_due: asyncio.TimerHandle | None = None
        _read_due: asyncio.TimerHandle | None = None
        _quiet_since = 0.0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            self._quiet_since = time.monotonic()
            transport.set_write_buffer_limits(0)  # pause_writing is called for whatever the client has not taken
            if len(self.connections) > options.connections and not self._close_a_quiet_one():
                self.connections.discard(self)
                _Refusal(transport, self.loop)
                return
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._headers_came()
            _cancel(self._read_due)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._headers_due is None and self.conn.their_state is h11.IDLE:
                self._await_headers()
            super().data_received(data)

        def handle_events(self) -> None:
            try:
                super().handle_events()
            except h11.LocalProtocolError:  # the answer to a broken request cannot be sent any more
                self.transport.close()
            if self.conn.their_state is not h11.IDLE:
                self._headers_came()

        def on_response_complete(self) -> None:
            self._quiet_since = time.monotonic()
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._await_reader(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            _cancel(self._read_due)
            super().resume_writing()

        def _await_headers(self) -> None:
            self._headers_due = self.loop.call_later(options.header_seconds, self.transport.close)

        def _headers_came(self) -> None:
            _cancel(self._headers_due)
            self._headers_due = None

        def _await_reader(self, unread: int) -> None:
            """Cut the connection unless the client takes some of ``unread`` bytes in time."""

            def look() -> None:
                left = self.transport.get_write_buffer_size()
                if left >= unread:
                    self.transport.abort()
                else:
                    self._await_reader(left)

            self._read_due = self.loop.call_later(options.send_seconds, look)

        def _close_a_quiet_one(self) -> bool:
            """Close the connection that has been without a request for longest; returns whether there is one."""
            others = (one for one in self.connections if isinstance(one, Connection) and one is not self)
            quiet = [one for one in others if one.is_quiet]
            if quiet:
                min(quiet, key=lambda one: one._quiet_since).transport.abort()
            return bool(quiet)

        @property
        def is_quiet(self) -> bool:
            """Whether no request has come whole, none is answered, and nothing is left to send."""
            is_answered = self.cycle is None or self.cycle.response_complete
            return is_answered and self.conn.their_state is h11.IDLE and not self.transport.get_write_buffer_size()

    return Connection


def h11_settings(options: ServeOptions) -> dict[str, Any]:
    """Settings of ``uvicorn.Config`` for such connections."""
    return {"http": make_protocol(options), "h11_max_incomplete_event_size": HEADER_BYTES}


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class _Refusal(asyncio.Protocol):
    """A connection that is one too many: it gets its answer, and its request is not looked at."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        transport.set_protocol(self)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(_FULL.body)), "Connection": "close"}
        lines = [f"{name}: {value}" for name, value in (headers | _FULL.headers).items()]
        transport.write("\r\n".join(["HTTP/1.1 503 Service Unavailable", *lines, "", ""]).encode() + _FULL.body)
        # Closed at once, with a request unread, the client's system would throw the answer away.
        transport.write_eof()
        self._end = loop.call_later(_REFUSED_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end.cancel()
