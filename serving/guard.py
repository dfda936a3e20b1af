"""Guard: what every request passes first. Keys, the server's end, and errors that no endpoint expects."""

from __future__ import annotations

import hmac

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adalink.serving.api_error import ApiError, as_api_error
from adalink.serving.gateway import Gateway
from adalink.serving.generating import error_response
from adalink.serving.json_body import JsonResponse

# What load balancers ask, which have no key.
_HEALTH = ("/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")


class Guard:
    """ASGI middleware before all endpoints; counts the requests under way."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app, self._gateway = app, gateway
        self._keys = [key.encode() for key in gateway.options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http" or scope["path"] in _HEALTH:
            await self._app(scope, receive, send)
            return
        has_started = False

        async def note_start(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        self._gateway.in_flight += 1
        try:
            self._check(HttpRequest(scope))
            await self._app(scope, receive, note_start)
        except ClientDisconnect:
            return
        except Exception as error:
            failed = as_api_error(error)
            if has_started:  # too late for an answer: the connection is closed, so that nobody takes it for whole
                raise
            await error_response(failed)(scope, receive, send)
        finally:
            self._gateway.in_flight -= 1

    def _check(self, request: HttpRequest) -> None:
        """Raise ``ApiError`` for a request without a key (401), or while the server ends (503)."""
        if self._keys:
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
            raise ApiError(503, "the server ends", code="shutting_down", headers={"Connection": "close"})


async def http_error(request: HttpRequest, error: Exception) -> JsonResponse:
    """The answer for an address or a method that does not exist."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    return error_response(ApiError(error.status_code, message, headers=error.headers))
