"""Models: the base and every task, as OpenAI's API lists them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest

from adalink.runtime.storage.known_tasks import split_name
from adalink.serving.gateway import Gateway
from adalink.serving.json_body import JsonResponse


async def list_models(request: HttpRequest) -> JsonResponse:
    """``GET /v1/models``."""
    gateway: Gateway = request.app.state.gateway
    names = (None, *gateway.deployment.tasks)
    return JsonResponse({"object": "list", "data": [_describe(gateway, name) for name in names]})


async def show_model(request: HttpRequest) -> JsonResponse:
    """``GET /v1/models/{model}``."""
    gateway: Gateway = request.app.state.gateway
    return JsonResponse(_describe(gateway, gateway.task_of(request.path_params["model"])))


def _describe(gateway: Gateway, task: str | None) -> dict[str, Any]:
    """A model; ``root`` and ``parent`` name the base, as for fine-tuned models.

    A task of the deployment with labels has ``problem_type`` and ``labels`` too.
    """
    entry = None if task is None else gateway.deployment.manifest.tasks.get(split_name(task)[0])
    head = None if entry is None else entry.head
    labels = {} if head is None else {"problem_type": head.problem_type, "labels": list(head.labels)}
    return {
        "id": gateway.base_name if task is None else task,
        "object": "model",
        "created": gateway.started,
        "owned_by": "adalink",
        "root": gateway.base_name,
        "parent": None if task is None else gateway.base_name,
        "max_model_len": gateway.max_positions,
        **labels,
    }
