"""Replica's application: the server's, as one of several behind proxies."""

from __future__ import annotations

import ipaddress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adalink.serving.api_error import ApiError
from adalink.serving.endpoints.completions import error_response

# Header of each answer that says which replica gave it.
REPLICA_HEADER = "x-adalink-replica"


class ReplicaApp:
    """ASGI application of a replica: it says its name, and does not tell what is true of itself alone."""

    def __init__(self, app: ASGIApp, name: str, *, is_open: bool) -> None:
        """Wrap the server's application.

        Args:
            app: what ``make_app`` gave.
            name: the replica's name.
            is_open: whether clients of other machines than the proxy's are answered.
        """
        self._app, self._is_open = app, is_open
        self._header = (REPLICA_HEADER.encode(), name.encode("latin-1"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""

        async def send_with_name(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), self._header]}
            await send(message)

        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (self._app if refusal is None else error_response(refusal))(scope, receive, send_with_name)

    def _refusal(self, scope: Scope) -> ApiError | None:
        if not self._is_open and not is_loopback(scope.get("client")):
            message = (
                "without a key only clients on the proxy's own machine are answered: give the application the argument "
                "api_key_file, or allow_without_key"
            )
            return ApiError(403, message, code="key_needed")
        if scope["path"] == "/metrics":
            message = "each replica counts for itself: Ray's port for metrics has those of all replicas of a machine"
            return ApiError(404, message, code="not_here")
        return None


def is_loopback(client: tuple[str, int] | None) -> bool:
    """Whether a connection comes from the machine itself.

    Args:
        client: address and port, as a server gives them; ``None`` where it does not know them.
    """
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
