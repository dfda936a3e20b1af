"""Replica: one process with the whole deployment and all its tasks, behind Ray Serve's proxies."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from ray import serve
from starlette.types import ASGIApp

from adalink.runtime.deployment import Deployment
from adalink.serving.app import make_app
from adalink.serving.gateway import Gateway
from adalink.serving.keys import read_keys
from adalink.serving.options import ServeOptions
from adalink.serving.ray.metrics import RayExport
from adalink.serving.ray.options import ReplicaOptions
from adalink.serving.ray.replica_app import ReplicaApp
from adalink.serving.watching import watch

# Time between two looks at the folder.
_WATCH_SECONDS = 1.0


@serve.ingress()
class Replica:
    """A replica; Ray Serve makes it, asks for its health and ends it. The application is built in its process."""

    def __init__(self, options: ReplicaOptions) -> None:
        """Open the deployment; raises what ``Deployment.open`` raises."""
        keys = () if options.api_key_file is None else read_keys(Path(options.api_key_file))
        self._is_open = bool(keys) or options.allow_without_key
        self._options = ServeOptions(
            api_keys=keys,
            body_bytes=None if options.body_limit is None else options.body_limit << 20,
            request_seconds=options.timeout,
            watch_seconds=_WATCH_SECONDS if options.watch else None,
            drain_seconds=options.drain,
            checks_host=not self._is_open,
            slots=options.slots,
            context=options.context,
            page=False,  # it shows the load of one server
        )
        self._deployment = Deployment.open(
            options.deployment,
            options.backend,
            variant=options.variant,
            threads=options.threads,
            prefix_cache_bytes=options.prefix_cache << 20,
            slots=options.slots,
            context=options.context,
            queue_limit=options.queue,
        )

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application; Ray Serve calls this once, in the event loop that answers."""
        app = make_app(self._deployment, self._options)
        self._gateway: Gateway = app.state.gateway
        self._background = [asyncio.ensure_future(RayExport(self._gateway.metrics).keep_pushing())]
        if self._options.watch_seconds is not None:
            self._background.append(asyncio.ensure_future(watch(self._gateway, self._options.watch_seconds)))
        name = serve.get_replica_context().replica_id.unique_id
        return ReplicaApp(app, name, is_open=self._is_open)

    async def check_health(self) -> None:
        """Ready for requests; Ray Serve replaces a replica that raises here, or whose event loop stands still.

        Raises:
            RuntimeError: the replica ends, or it follows the folder no longer.
        """
        if self._gateway.is_draining:
            raise RuntimeError("the replica ends")
        for task in self._background:
            if task.done():
                raise RuntimeError("the replica follows its folder or counts no longer") from task.exception()

    async def __del__(self) -> None:
        """Close the deployment; Ray Serve calls this once running requests have ended."""
        self._gateway.is_draining = True
        for task in self._background:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._gateway.in_thread(self._deployment.close)
