"""Options of the application for Ray Serve, as ``serve run`` and the ``args`` of a ``serve`` YAML give them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from adalink.runtime.errors import ConfigError


class ReplicaOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of ``adalink.serving.ray:app``. They mean what those of ``adalink serve`` mean.

    Attributes:
        deployment: the deployment folder, at the same path on every machine.
        backend: the engine.
        variant: base variant, such as ``"int4"``.
        threads: threads of a replica's engine, and the CPUs that Ray reserves for it.
        gpus: GPUs that Ray reserves for a replica.
        slots: requests that decode together in a replica.
        context: most positions of a request; memory for all slots is then taken once.
        queue: requests that wait at each proxy for a replica; further ones are answered with 503.
        prefix_cache: size of a replica's prefix cache in MiB.
        replicas: replicas, where their number is fixed; 1 by default.
        min_replicas: least replicas, where their number follows the load; 1 by default.
        max_replicas: most replicas; turns autoscaling on.
        target: requests a replica that autoscaling aims at, those that wait included; by default ``slots``.
        watch: take up tasks that are exported into the folder or removed there.
        api_key_file: file with a key a line, at the same path on every machine; each request must bear one.
        allow_without_key: answer clients of other machines without a key too.
        body_limit: largest body of a request in MiB.
        timeout: most seconds of a request, waiting in its replica included; at most ``drain``.
        drain: most seconds that running requests get when their replica is stopped.
    """

    deployment: str
    backend: str = "onnxruntime-cpu"
    variant: str | None = None
    threads: int = 1
    gpus: float = 0
    slots: int = 16
    context: int | None = None
    queue: int = 256
    prefix_cache: int = 0
    replicas: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    target: float | None = None
    watch: bool = True
    api_key_file: str | None = None
    allow_without_key: bool = False
    body_limit: int | None = None
    timeout: float | None = None
    drain: float = 30

    def __post_init__(self) -> None:
        at_least_1 = ("threads", "slots", "context", "queue", "replicas", "max_replicas", "body_limit")
        for name in (*at_least_1, "min_replicas", "prefix_cache", "gpus", "drain"):
            value, least = getattr(self, name), int(name in at_least_1)
            if value is not None and not least <= value < float("inf"):
                raise ValueError(f"{name} is {value}, expected at least {least}")
        for name in ("target", "timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}, expected more than 0")
        if self.max_replicas is None and (self.min_replicas, self.target) != (None, None):
            raise ValueError("min_replicas and target belong to autoscaling: give max_replicas too")
        if self.max_replicas is not None and self.replicas is not None:
            raise ValueError("replicas fixes their number, max_replicas lets it follow the load: give one of them")
        if self.max_replicas is not None and (self.min_replicas or 0) > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, more than max_replicas, {self.max_replicas}")
        if self.timeout is not None and self.timeout > self.drain:
            raise ValueError(
                f"timeout is {self.timeout:g} s and drain {self.drain:g} s: a replica that is stopped would cut its "
                "last answers, so give drain at least the timeout"
            )

    @property
    def deployment_options(self) -> dict[str, Any]:
        """Options of Ray Serve's deployment: how many replicas, what each reserves, and how it ends."""
        number: dict[str, Any] = {"num_replicas": self.replicas or 1}
        if self.max_replicas is not None:
            number = {
                "autoscaling_config": {
                    "min_replicas": 1 if self.min_replicas is None else self.min_replicas,
                    "max_replicas": self.max_replicas,
                    "target_ongoing_requests": self.target or float(self.slots),
                }
            }
        return {
            **number,
            "ray_actor_options": {"num_cpus": self.threads, "num_gpus": self.gpus},
            # As many wait in a replica as decode there, so that a slot which becomes free is taken at once. All others
            # wait at the proxies, whence any replica may take them.
            "max_ongoing_requests": 2 * self.slots,
            "max_queued_requests": self.queue,
            "graceful_shutdown_timeout_s": self.drain,
            "graceful_shutdown_wait_loop_s": 0.5,
            "health_check_period_s": 5,
        }


def read_options(args: Mapping[str, Any]) -> ReplicaOptions:
    """Options of arguments, whose values may be texts, as a command line gives them.

    Args:
        args: arguments by name.

    Raises:
        ConfigError: an argument is unknown, missing, of a wrong type or out of range.
    """
    try:
        options = msgspec.convert(dict(args), ReplicaOptions, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"arguments of adalink.serving.ray:app: {_in_words(str(error))}") from error
    # A replica starts in a folder of Ray's.
    return msgspec.structs.replace(
        options,
        deployment=str(Path(options.deployment).absolute()),
        api_key_file=None if options.api_key_file is None else str(Path(options.api_key_file).absolute()),
    )


def _in_words(message: str) -> str:
    """A message of msgspec in the words of who gave the argument."""
    message = message.replace("Object contains unknown field", "there is no argument")
    message = message.replace("Object missing required field", "missing argument")
    return message.replace(" - at `$.", ", given as `")
