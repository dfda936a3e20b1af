"""Builder: arguments to an application of Ray Serve."""

from __future__ import annotations

from typing import Any

from ray import serve

from adalink.serving.ray.options import read_options
from adalink.serving.ray.replica import Replica


def app(args: dict[str, Any]) -> serve.Application:
    """An application for ``serve run adalink.serving.ray:app deployment=DIR replicas=2`` and ``serve`` YAML files.

    Args:
        args: arguments by name; see ``ReplicaOptions``.

    Raises:
        ConfigError: an argument is unknown, missing, of a wrong type or out of range.
    """
    options = read_options(args)
    return serve.deployment(Replica, name="AdaLink").options(**options.deployment_options).bind(options)
