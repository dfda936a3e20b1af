"""Gateway: the deployment as the endpoints use it, and which requests are under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import ConfigError, IntegrityError, RequestError, UnknownTaskError
from adalink.runtime.generation.handle import Handle
from adalink.runtime.generation.request import Request
from adalink.runtime.storage.manifest import Base
from adalink.serving.api_error import ApiError
from adalink.serving.metrics import Metrics
from adalink.serving.options import IMAGE_BODY_BYTES, TEXT_BODY_BYTES, ServeOptions
from adalink.serving.running_choices import RunningChoices
from adalink.serving.token_texts import TokenTexts

# Threads that read requests: their templates, tokens and images. More would only wait for each other.
_THREADS = 4
# How often a request is tried while its task's files change in a watched folder.
_TRIES = 3


class Gateway:
    """A deployment, its models by name, and the requests under way; for one event loop.

    Attributes:
        deployment: the deployment.
        options: the server's options.
        metrics: its metrics.
        started: when it was made, in seconds since 1970.
        is_draining: whether new requests are refused, since the server ends.
        in_flight: HTTP requests under way, health checks aside.
        held_bytes: bytes of their bodies.
    """

    def __init__(self, deployment: Deployment, options: ServeOptions) -> None:
        """Take a deployment; raises ``ConfigError`` if a task has the base's name."""
        self.deployment, self.options = deployment, options
        self.started = int(time.time())
        self.is_draining = False
        self.in_flight = self.held_bytes = 0
        if self.base_name in deployment.tasks:
            raise ConfigError(
                f"task {self.base_name!r} has the name of the base model, so that the name says no longer who answers: "
                "export the adapter under another name"
            )
        self.metrics = Metrics(
            lambda: deployment.running, lambda: deployment.waiting, lambda: len(deployment.tasks), options.slots
        )
        self._ended_by: ApiError | None = None
        self._active: set[RunningChoices] = set()
        self._threads = ThreadPoolExecutor(_THREADS, "adalink-requests")

    @property
    def base(self) -> Base:
        """The base contract."""
        return self.deployment.manifest.base

    @property
    def base_name(self) -> str:
        """The base model's name among the models."""
        return self.base.name

    @property
    def body_bytes(self) -> int:
        """Most bytes of a request's body."""
        default = TEXT_BODY_BYTES if self.base.vision is None else IMAGE_BODY_BYTES
        return self.options.body_bytes or default

    @property
    def bodies_bytes(self) -> int:
        """Most bytes of the bodies of all requests under way."""
        return self.options.bodies_bytes or 16 * self.body_bytes

    @property
    def max_positions(self) -> int | None:
        """Most positions of a prompt and its reply; ``None`` without a limit."""
        limits = [limit for limit in (self.base.max_positions, self.options.context) if limit is not None]
        return min(limits, default=None)

    @cached_property
    def token_texts(self) -> TokenTexts:
        """Texts of single tokens."""
        return TokenTexts(self.deployment.tokenizer)

    def task_of(self, model: str) -> str | None:
        """The task of a model's name, ``None`` for the base model; raises ``ApiError`` (404) for any other name."""
        if model == self.base_name:
            return None
        try:
            self.deployment.check_task(model)
        except UnknownTaskError as error:
            message = f"the model {model[:80]!r} does not exist: see /v1/models"
            raise ApiError(404, message, "model", "model_not_found") from error
        except RequestError as error:
            raise ApiError(404, str(error), "model", "model_not_found") from error
        return model

    async def in_thread(self, call: Any, *arguments: Any) -> Any:
        """Run what computes beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def with_tasks(self, call: Any, *arguments: Any) -> Any:
        """Run what uses tasks beside the event loop, with tasks as the folder has them now where it is watched.

        A task that was replaced or removed there has lost its files before the next look at the folder.
        """
        tries = 1 if self.options.watch_seconds is None else _TRIES
        for _ in range(tries - 1):
            try:
                return await self.in_thread(call, *arguments)
            except IntegrityError:
                await self.in_thread(self.deployment.reload)
        return await self.in_thread(call, *arguments)

    async def submit(self, requests: Sequence[Request], model: str) -> RunningChoices:
        """Submit the choices of one HTTP request, all or none; raises what ``Deployment.submit`` raises."""
        stopwatches = [self.metrics.stopwatch(model) for _ in requests]
        handles = await self.with_tasks(_submit_all, self.deployment, requests)
        running = RunningChoices(handles, [stopwatch.lap for stopwatch in stopwatches])
        self._active.add(running)
        if self._ended_by is not None:
            running.end(self._ended_by)
        return running

    def forget(self, running: RunningChoices) -> None:
        """The HTTP request has ended: free its slots, whatever is still running."""
        running.leave()
        self._active.discard(running)

    def end_all(self, error: ApiError) -> None:
        """End all requests under way, and those to come."""
        self._ended_by = error
        for running in tuple(self._active):
            running.end(error)


def _submit_all(deployment: Deployment, requests: Sequence[Request]) -> list[Handle]:
    handles: list[Handle] = []
    try:
        for request in requests:
            handles.append(deployment.submit(request))
    except BaseException as error:
        for handle in handles:
            handle.cancel()
        if isinstance(error, RequestError) and str(error).startswith("the deployment is closed"):
            raise ApiError(503, "the server ends", code="shutting_down") from error
        raise
    return handles
