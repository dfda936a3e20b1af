"""JSON of requests and answers: bodies of bounded size, decoded into typed structs.

The decoder bounds the depth of what it reads; the runtime bounds that of messages and tools.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from adalink.runtime.storage.decoding import decode_json
from adalink.serving.api_error import ApiError

T = TypeVar("T")
_WHERE = re.compile(r" - at `(?:key in )?\$\.?(?P<path>[^`]*)`$")


class JsonResponse(Response):
    """An answer in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The content as JSON; bytes are JSON already."""
        return content if isinstance(content, bytes) else msgspec.json.encode(content)


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The body of a request.

    Args:
        request: the request.
        limit: most bytes.
        seconds: most seconds until its end.

    Raises:
        ApiError: it is too large (413), too slow (408) or not declared as JSON (415).
        ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind[:80]!r}, expected application/json")
    close = {"Connection": "close"}  # the rest of the body is not read
    too_large = ApiError(413, f"the body has more than {limit} bytes: send less", headers=close)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large

    async def collect() -> bytes:
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
        return b"".join(chunks)

    try:
        return await asyncio.wait_for(collect(), seconds)
    except asyncio.TimeoutError as error:
        raise ApiError(408, f"the body has not come within {seconds:g} s", headers=close) from error


def decode_body(body: bytes, kind: type[T]) -> T:
    """A request's body as a struct.

    Raises:
        ApiError: it is no JSON, or nested too deeply, or a field is wrong (400, ``param`` names it).
    """
    try:
        return decode_json(body, kind)
    except msgspec.ValidationError as error:
        found = _WHERE.search(str(error))
        path = found["path"] if found else None
        what = str(error)[: found.start()] if found else str(error)
        if match := re.match(r"Object missing required field `([^`]+)`", what):
            path = f"{path}.{match[1]}" if path else match[1]
            raise ApiError(400, f"{path} is missing", path) from error
        raise ApiError(400, f"{path or 'the body'}: {what}", path or None) from error
    except msgspec.DecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error


__all__ = ["ClientDisconnect", "JsonResponse", "decode_body", "read_body"]
