"""The application: a Starlette app over an open deployment."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from adalink.runtime.deployment import Deployment
from adalink.serving.endpoints.adapters import load_adapter, unload_adapter
from adalink.serving.endpoints.classify import classify
from adalink.serving.endpoints.completions import chat_completions, completions
from adalink.serving.endpoints.embeddings import embeddings
from adalink.serving.endpoints.health import live, metrics, ready
from adalink.serving.endpoints.inference import infer, model_metadata, model_ready, server_metadata
from adalink.serving.endpoints.models import list_models, show_model
from adalink.serving.endpoints.page import PAGE_ADDRESSES, page_routes
from adalink.serving.endpoints.tokenize import detokenize, tokenize
from adalink.serving.gateway import Gateway
from adalink.serving.guard import Guard, http_error
from adalink.serving.options import ServeOptions


def make_app(deployment: Deployment, options: ServeOptions | None = None) -> Starlette:
    """An ASGI application that serves a deployment; ``app.state.gateway`` says what is under way.

    Args:
        deployment: the deployment, which stays the caller's to close.
        options: its limits and keys.

    Raises:
        ConfigError: a task has the name of the base model.
    """
    gateway = Gateway(deployment, options or ServeOptions())
    routes = [
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", show_model),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/classify", classify, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/v2", server_metadata),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2/models/{model:path}/infer", infer, methods=["POST"]),
        Route("/v2/models/{model:path}/ready", model_ready),
        Route("/v2/models/{model:path}", model_metadata),
        Route("/health", live),
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/metrics", metrics),
    ]
    if gateway.options.tasks_folder is not None:
        routes.append(Route("/v1/load_lora_adapter", load_adapter, methods=["POST"]))
        routes.append(Route("/v1/unload_lora_adapter", unload_adapter, methods=["POST"]))
    if gateway.options.page:
        routes += page_routes()
    keyless = PAGE_ADDRESSES if gateway.options.page else frozenset[str]()
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, gateway=gateway, keyless=keyless)],
        exception_handlers={HTTPException: http_error},
    )
    app.state.gateway = gateway
    return app
