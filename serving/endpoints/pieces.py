"""Requests of many texts, a piece at a time: a client that has gone ends the work."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from adalink.serving.api_error import as_api_error
from adalink.serving.endpoints.completions import outcome_of
from adalink.serving.gateway import Gateway
from adalink.serving.json_body import ClientDisconnect, JsonResponse

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


async def counted(gateway: Gateway, model: str, answer: Awaitable[JsonResponse]) -> JsonResponse:
    """An answer of such a request; how it ended is counted.

    Raises:
        ApiError: it failed.
    """
    try:
        response = await answer
    except ClientDisconnect:
        gateway.metrics.count_request(model, "cancelled")
        return JsonResponse(b"{}")  # nobody reads it
    except Exception as error:
        failed = as_api_error(error)
        gateway.metrics.count_request(model, outcome_of(failed))
        raise failed from error
    gateway.metrics.count_request(model, "ok")
    return response
