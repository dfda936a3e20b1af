"""Proxy: what Ray Serve's own proxies answer, in the form of the server's errors.

A proxy that loses a replica answers 500, or cuts the stream. Clients should see 503, and come again.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adalink.runtime.logs import get_logger
from adalink.serving.api_error import ApiError
from adalink.serving.endpoints.completions import error_response

_LOG = get_logger(__name__)
# What a proxy answers by itself, with a bare text.
_REFUSALS = {
    408: ("the request took longer than the proxy's limit", "timeout"),
    429: ("the queue is full: try again later", "queue_full"),
    503: ("the queue is full: try again later", "queue_full"),
}
_PROXY_STATUSES = (*_REFUSALS, 500)


def middlewares() -> list[Middleware]:
    """For Ray Serve, which calls it where ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names it."""
    return [Middleware(ProxyErrors)]


class ProxyErrors:
    """ASGI middleware of a proxy: a lost replica is 503, or an error event; all errors are OpenAI's objects."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and mend what the proxy itself answers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            await self._app(scope, receive, answer.pass_on)
        except Exception:
            _LOG.exception("the proxy failed")
        if answer.has_ended:
            return
        if answer.bare_status is not None:
            await error_response(_refusal(answer.bare_status, answer.bare_text))(scope, receive, send)
        elif not answer.has_started:
            await error_response(_lost())(scope, receive, send)
        elif answer.is_event_stream:
            event = b"data: " + _lost().body + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": False})
        # Else the server closes the connection, so that nobody takes the answer for whole.


class _Answer:
    """An answer on its way to the client.

    Attributes:
        has_started: whether it has begun.
        has_ended: whether all of it is sent.
        is_event_stream: whether it is a stream of events.
        bare_status: status of an answer that is the proxy's own, and is kept back.
        bare_text: its text.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_started = self.has_ended = self.is_event_stream = False
        self.bare_status: int | None = None
        self.bare_text = b""

    async def pass_on(self, message: Message) -> None:
        """Send a message, or keep it back."""
        if message["type"] == "http.response.start":
            kind = next((value for name, value in message.get("headers", ()) if name.lower() == b"content-type"), b"")
            if message["status"] in _PROXY_STATUSES and kind.startswith(b"text/plain"):
                self.bare_status = message["status"]
                return
            self.has_started, self.is_event_stream = True, kind.startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            if self.bare_status is not None:
                self.bare_text += message.get("body", b"")
                return
            self.has_ended = not message.get("more_body", False)
        await self._send(message)


def _lost() -> ApiError:
    return ApiError(503, "the replica that was to answer is lost: ask again", code="replica_lost")


def _refusal(status: int, text: bytes) -> ApiError:
    """The error of a proxy's own answer; the text of a 500 may tell paths."""
    if status == 500:
        return ApiError(500, "the proxy could not answer; its log says why", code="internal_error")
    if status == 503 and b"backpressure" not in text:
        return ApiError(503, "no replica can answer now: try again later", code="unavailable")
    message, code = _REFUSALS[status]
    return ApiError(status, message, code=code)
