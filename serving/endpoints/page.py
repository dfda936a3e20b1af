"""The page at ``/``: asks several models at once in a browser.

Its files need no key, since nothing in them is secret; what they show comes from the API, which asks for one.
"""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from adalink.serving.gateway import Gateway
from adalink.serving.json_body import JsonResponse

# Address -> file in the folder `page` and its type. No other file is ever read.
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
PAGE_ADDRESSES = frozenset(_FILES)

_HEADERS = {
    # Nothing inline and nothing from elsewhere: a text of a model that became HTML could still run nothing.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A browser keeps the files, and asks each time whether they are still the same.
    "Cache-Control": "no-cache",
}
_TAG = re.compile(r'"[^"]*"|\*')


def page_routes() -> list[Route]:
    """Routes of the page's files and of what it shows about the server."""
    routes = [Route(address, _file_endpoint(name, kind)) for address, (name, kind) in _FILES.items()]
    return [*routes, Route("/page/state", state)]


async def state(request: HttpRequest) -> JsonResponse:
    """``GET /page/state``: the models, what they take, and the load of now. ``tokens`` counts since the start."""
    gateway: Gateway = request.app.state.gateway
    deployment, base = gateway.deployment, gateway.base
    # Tasks of an encoder may have labels; one that has none says so when it is asked.
    classifies = base.kind == "encoder" and base.tokenizer is not None and bool(deployment.tasks)
    answer: dict[str, Any] = {
        "base": gateway.base_name,
        "models": list(deployment.tasks) if classifies else [gateway.base_name, *deployment.tasks],
        "kind": base.kind,
        "generates": base.kind != "encoder" and base.tokenizer is not None,
        "classifies": classifies,
        "chats": base.kind != "encoder" and base.chat_template is not None,
        "sees": base.vision is not None,
        # Where to ask a base that generates no text.
        "api": f"v2/models/{quote(gateway.base_name, safe='')}/infer",
        "running": deployment.running,
        "waiting": deployment.waiting,
        "slots": gateway.options.slots,
        "tokens": gateway.metrics.tokens,
    }
    return JsonResponse(answer, headers={"Cache-Control": "no-store"})


def _file_endpoint(name: str, kind: str) -> Any:
    """An endpoint that sends a file of the folder ``page``, or says that the browser has it (304)."""
    content = (files("adalink.serving.endpoints") / "page" / name).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}

    async def send(request: HttpRequest) -> Response:
        known = _TAG.findall(request.headers.get("if-none-match", ""))
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(content, headers={**headers, "Content-Type": kind})

    return send
