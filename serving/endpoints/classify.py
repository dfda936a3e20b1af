"""``/v1/classify``: labels of texts, by tasks that were trained on rows with labels."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest

from adalink.runtime.text_classifier import Classification, PreparedPrompt, PreparedText
from adalink.serving.api_error import ApiError
from adalink.serving.endpoints.completions import read_fields
from adalink.serving.endpoints.embeddings import MOST_TEXTS
from adalink.serving.endpoints.pieces import counted, in_pieces
from adalink.serving.gateway import Gateway
from adalink.serving.json_body import JsonResponse
from adalink.serving.openai.fields import ClassifyFields


async def classify(request: HttpRequest) -> JsonResponse:
    """``POST /v1/classify``."""
    gateway: Gateway = request.app.state.gateway
    fields: ClassifyFields = await read_fields(request, gateway, ClassifyFields)
    task = gateway.task_of(fields.model)
    return await counted(gateway, fields.model, _answer(request, gateway, fields, task))


async def _answer(request: HttpRequest, gateway: Gateway, fields: ClassifyFields, task: str | None) -> JsonResponse:
    classifier = gateway.deployment.text_classifier
    texts = _texts(fields.input)
    prepared: list[PreparedText | PreparedPrompt] = await gateway.with_tasks(
        classifier.prepare, texts, task, fields.labels, fields.calibration
    )
    scores = [row async for rows in in_pieces(request, prepared, classifier.scores) for row in rows]
    results = [text.read(row) for text, row in zip(prepared, scores, strict=True)]
    tokens = sum(result.tokens for result in results)
    gateway.metrics.count_prompt_tokens(fields.model, tokens)
    entries = [_describe(index, result) for index, result in enumerate(results)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JsonResponse({"object": "list", "data": entries, "model": fields.model, "usage": usage})


def _texts(given: str | list[str | list[str]]) -> list[str | tuple[str, str]]:
    """The texts and pairs of a request; raises ``ApiError``."""
    texts = [given] if isinstance(given, str) else given
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise ApiError(400, f"input has {len(texts)} texts, expected 1 to {MOST_TEXTS}", "input")
    if wrong := [index for index, text in enumerate(texts) if isinstance(text, list) and len(text) != 2]:
        raise ApiError(400, f"input[{wrong[0]}] has {len(texts[wrong[0]])} texts, expected a text or two", "input")
    return [text if isinstance(text, str) else (text[0], text[1]) for text in texts]


def _describe(index: int, result: Classification) -> dict[str, Any]:
    """An entry of the answer, with the fields that a task of its kind fills."""
    return {"object": "classification", "index": index, **result.as_record()}
