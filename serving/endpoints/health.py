"""Health and metrics: for load balancers and Prometheus."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from adalink.serving.gateway import Gateway
from adalink.serving.json_body import JsonResponse
from adalink.serving.metrics import CONTENT_TYPE


async def live(request: HttpRequest) -> JsonResponse:
    """``GET /health/live``: the process answers."""
    return JsonResponse({"status": "live"})


async def ready(request: HttpRequest) -> JsonResponse:
    """``GET /health/ready``: new requests are taken; 503 while the server ends."""
    gateway: Gateway = request.app.state.gateway
    if gateway.is_draining:
        return JsonResponse({"status": "draining"}, 503)
    return JsonResponse({"status": "ready"})


async def metrics(request: HttpRequest) -> Response:
    """``GET /metrics``, in Prometheus's text format."""
    gateway: Gateway = request.app.state.gateway
    return Response(gateway.metrics.render(), headers={"Content-Type": CONTENT_TYPE})
