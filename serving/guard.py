"""Guard: what every request passes first. Keys, the server's end, and errors that no endpoint expects."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Set

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adalink.serving.api_error import ApiError, as_api_error
from adalink.serving.endpoints.completions import error_response
from adalink.serving.gateway import Gateway
from adalink.serving.json_body import JsonResponse

# What load balancers ask, which have no key.
_HEALTH = ("/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")

_CLOSE = {"Connection": "close"}


class Guard:
    """ASGI middleware before all endpoints; counts the requests under way."""

    def __init__(self, app: ASGIApp, gateway: Gateway, keyless: Set[str] = frozenset()) -> None:
        """``keyless`` are further paths that need no key: files that hold no secret."""
        self._app, self._gateway, self._keyless = app, gateway, keyless
        self._keys = [key.encode() for key in gateway.options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http" or scope["path"] in _HEALTH:
            await self._app(scope, receive, send)
            return
        has_started, held = False, 0

        async def receive_bounded() -> Message:
            nonlocal held
            message = await receive()
            size = len(message.get("body", b""))
            held += size
            self._gateway.held_bytes += size
            if size and self._gateway.held_bytes > self._gateway.bodies_bytes:
                raise ApiError(503, "too many large requests are under way: try again later", headers=_CLOSE)
            return message

        async def note_start(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        self._gateway.in_flight += 1
        try:
            self._check(HttpRequest(scope))
            await self._app(scope, receive_bounded, note_start)
        except ClientDisconnect:
            return
        except Exception as error:
            failed = as_api_error(error)
            if has_started:  # too late for an answer: the connection is closed, so that nobody takes it for whole
                raise
            await error_response(failed)(scope, receive, send)
        finally:
            self._gateway.in_flight -= 1
            self._gateway.held_bytes -= held

    def _check(self, request: HttpRequest) -> None:
        """Raise ``ApiError``: the wrong host (403), no key (401), or the server ends (503)."""
        if self._gateway.options.checks_host and not is_local(request.headers.get("host", "")):
            raise ApiError(
                403,
                "the header Host is neither localhost nor an address: ask by address, or let the server ask for a key",
                code="wrong_host",
            )
        if self._keys and request.scope["path"] not in self._keyless:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            given = key.strip().encode("latin-1")  # the bytes that were sent
            # All are compared, so that the time does not tell which one is near.
            matches = [hmac.compare_digest(given, known) for known in self._keys]
            if scheme.lower() != "bearer" or not any(matches):
                headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
                raise ApiError(
                    401,
                    "expected the header 'Authorization: Bearer KEY' with a valid key",
                    code="invalid_api_key",
                    headers=headers,
                )
        if self._gateway.is_draining and request.scope["path"] != "/metrics":
            raise ApiError(503, "the server ends", code="shutting_down", headers=_CLOSE)


def is_local(host: str) -> bool:
    """Whether a header ``Host`` is ``localhost`` or an address, with or without a port."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def http_error(request: HttpRequest, error: Exception) -> JsonResponse:
    """The answer for an address or a method that does not exist."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    return error_response(ApiError(error.status_code, message, headers=error.headers))
