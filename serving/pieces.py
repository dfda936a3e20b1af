"""Requests of many texts, a piece at a time: a client that has gone ends the work."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from adalink.serving.gateway import Gateway
from adalink.serving.json_body import ClientDisconnect

T = TypeVar("T")

# Texts between two looks at whether the client is still there.
_TEXTS_AT_ONCE = 64


async def in_pieces(
    request: HttpRequest, texts: Sequence[Any], compute: Callable[..., T], *arguments: Any
) -> AsyncIterator[T]:
    """What ``compute`` gives for some of the texts after others, beside the event loop.

    Raises:
        ClientDisconnect: the client has gone.
    """
    gateway: Gateway = request.app.state.gateway
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        if await request.is_disconnected():
            raise ClientDisconnect
        result: T = await gateway.with_tasks(compute, texts[start : start + _TEXTS_AT_ONCE], *arguments)
        yield result
