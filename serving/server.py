"""Server: listens, and ends without cutting an answer."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import ConfigError
from adalink.runtime.logs import get_logger
from adalink.serving.api_error import ApiError
from adalink.serving.app import make_app
from adalink.serving.connections import h11_settings
from adalink.serving.gateway import Gateway
from adalink.serving.options import ServeOptions
from adalink.serving.watching import watch

_LOG = get_logger(__name__)
# Seconds in which ended requests must have sent their last event; connections that do not read are cut then.
_LAST_SECONDS = 5
# Most bytes of answers that the system holds for a client. Small, so that a slow reader is told from one that stopped.
_SEND_BUFFER_BYTES = 256 << 10


def serve(
    deployment: Deployment,
    host: str = "127.0.0.1",
    port: int = 8000,
    options: ServeOptions | None = None,
    *,
    allow_without_key: bool = False,
    on_listen: Callable[[str, int], None] | None = None,
) -> None:
    """Serve a deployment until SIGTERM or SIGINT; returns once running requests have ended.

    Args:
        deployment: the deployment, which stays the caller's to close.
        host: the address to listen on.
        port: the port; 0 for any free one.
        options: limits and keys.
        allow_without_key: listen on other addresses than loopback ones without a key too.
        on_listen: called with the address and port once requests are taken.

    Raises:
        ConfigError: the address cannot be listened on, or would be open to others without a key.
    """
    options = options or ServeOptions()
    options = replace(options, checks_host=options.checks_host or not (allow_without_key or options.api_keys))
    app = make_app(deployment, options)
    with bind(host, port, is_open=allow_without_key or bool(options.api_keys)) as listener:
        DrainingServer(app, on_listen).run([listener])


def bind(host: str, port: int, *, is_open: bool) -> socket.socket:
    """A socket that listens on an address.

    Args:
        host: a name or an address.
        port: the port; 0 for any free one.
        is_open: whether the address may be one that others reach.

    Raises:
        ConfigError: the address is not there, is taken, or others would reach it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host!r} is no address of this machine: {error}") from error
    if not is_open and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ConfigError(
            f"{host} can be reached from other machines, and there is no key: give an API key, listen on 127.0.0.1, or "
            "allow it without a key"
        )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # each connection's, too
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}; choose another") from error
    return listener


class DrainingServer(uvicorn.Server):
    """A server that refuses new requests and lets running ones end before it stops listening."""

    def __init__(self, app: Starlette, on_listen: Callable[[str, int], None] | None = None) -> None:
        """Prepare to serve.

        Args:
            app: what ``make_app`` gave.
            on_listen: called with address and port once requests are taken.
        """
        gateway: Gateway = app.state.gateway
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=_LAST_SECONDS,
                **h11_settings(gateway.options),
            )
        )
        self._gateway, self._on_listen = gateway, on_listen
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening; see ``uvicorn.Server.shutdown``."""
        if self._watching is not None:
            self._watching.cancel()
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; see ``uvicorn.Server.startup``."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self._gateway.options.watch_seconds is not None:
            self._watching = asyncio.ensure_future(watch(self._gateway, self._gateway.options.watch_seconds))
        if self._on_listen is not None:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_listen(host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: end in order. A further SIGINT: end the running requests now."""
        is_again = self._gateway.is_draining and sig == signal.SIGINT
        self._soon(self._end_now if is_again else self._begin_to_drain)

    def drain(self) -> None:
        """End once running requests have ended, or ``drain_seconds`` have passed; for any thread."""
        self._soon(self._begin_to_drain)

    def _soon(self, call: Callable[[], None]) -> None:
        if self._loop is None:
            self.should_exit = True
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(call)

    def _begin_to_drain(self) -> None:
        if self._draining is None:
            self._gateway.is_draining = True
            _LOG.info("the server ends: %d requests under way", self._gateway.in_flight)
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        if not await self._wait_idle(self._gateway.options.drain_seconds):
            self._end_now()
            await self._wait_idle(_LAST_SECONDS)
        self.should_exit = True

    def _end_now(self) -> None:
        self._gateway.end_all(ApiError(503, "the server ended before this answer did", code="shutting_down"))

    async def _wait_idle(self, seconds: float) -> bool:
        """Wait until no request is under way; returns whether that is so."""
        end = asyncio.get_running_loop().time() + seconds
        while self._gateway.in_flight:
            if asyncio.get_running_loop().time() >= end:
                return False
            await asyncio.sleep(0.02)
        return True
