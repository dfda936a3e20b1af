"""The server: a deployment behind OpenAI's API, every task a model. Starlette, uvicorn, msgspec, prometheus-client."""

from typing import TYPE_CHECKING

from adalink.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from adalink.serving.app import make_app
    from adalink.serving.options import ServeOptions
    from adalink.serving.server import serve
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "ServeOptions": "adalink.serving.options",
            "make_app": "adalink.serving.app",
            "serve": "adalink.serving.server",
        },
    )

__all__ = ["ServeOptions", "make_app", "serve"]
