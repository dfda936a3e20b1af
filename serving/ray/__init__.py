"""Ray Serve: replicas of the server on several machines, behind one address. Needs the extra ``ray``."""

from typing import TYPE_CHECKING

from adalink.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from adalink.serving.ray.builder import app
    from adalink.serving.ray.options import ReplicaOptions
    from adalink.serving.ray.proxy import middlewares
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "ReplicaOptions": "adalink.serving.ray.options",
            "app": "adalink.serving.ray.builder",
            "middlewares": "adalink.serving.ray.proxy",
        },
    )

__all__ = ["ReplicaOptions", "app", "middlewares"]
