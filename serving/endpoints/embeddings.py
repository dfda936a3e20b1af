"""``/v1/embeddings``, as OpenAI has it: vectors of texts by the base encoder or any task."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from starlette.requests import Request as HttpRequest

from adalink.runtime.arrays import Array
from adalink.runtime.text_encoder import EncodedText
from adalink.serving.api_error import ApiError
from adalink.serving.endpoints.completions import read_fields
from adalink.serving.endpoints.pieces import counted, in_pieces
from adalink.serving.gateway import Gateway
from adalink.serving.json_body import JsonResponse
from adalink.serving.openai.fields import EmbeddingFields
from adalink.serving.openai.inputs import split_prompts

# Most texts of a request, as with OpenAI.
MOST_TEXTS = 2048


async def embeddings(request: HttpRequest) -> JsonResponse:
    """``POST /v1/embeddings``."""
    gateway: Gateway = request.app.state.gateway
    fields: EmbeddingFields = await read_fields(request, gateway, EmbeddingFields)
    task = gateway.task_of(fields.model)
    return await counted(gateway, fields.model, _answer(request, gateway, fields, task))


async def _answer(request: HttpRequest, gateway: Gateway, fields: EmbeddingFields, task: str | None) -> JsonResponse:
    encoder = gateway.deployment.text_encoder
    choice = encoder.choose(fields.pooling, fields.normalize)
    _check_dimensions(fields, encoder.width(choice[0]))
    encoded: list[EncodedText] = await gateway.with_tasks(_tokenize, gateway, fields, task)
    pieces = [piece async for piece in in_pieces(request, encoded, encoder.pool, choice)]
    answer: bytes = await gateway.in_thread(_render, fields, encoded, np.concatenate(pieces))
    gateway.metrics.count_prompt_tokens(fields.model, _count_tokens(encoded))
    return JsonResponse(answer)


def _check_dimensions(fields: EmbeddingFields, width: int) -> None:
    if fields.dimensions not in (None, width):
        raise ApiError(
            400,
            f"dimensions is {fields.dimensions}, and vectors of this model have {width} numbers: leave it out",
            "dimensions",
        )


def _tokenize(gateway: Gateway, fields: EmbeddingFields, task: str | None) -> list[EncodedText]:
    """Tokens of each text; one that is too long is an error unless the request asks for the cut."""
    texts = split_prompts(fields.input, "input")
    if len(texts) > MOST_TEXTS:
        raise ApiError(400, f"input has {len(texts)} texts, at most {MOST_TEXTS} are taken: send less", "input")
    encoded = gateway.deployment.text_encoder.tokenize(texts, task)
    cut = [index for index, text in enumerate(encoded) if text.is_cut]
    if cut and fields.truncate_prompt_tokens != -1:
        limit = len(encoded[cut[0]].ids)
        raise ApiError(
            400,
            f"text {cut[0]} of input has more than the {limit} tokens that the model's files allow: shorten it, or "
            "send truncate_prompt_tokens: -1 to have it cut",
            "input",
        )
    return encoded


def _count_tokens(encoded: Sequence[EncodedText]) -> int:
    return sum(len(text.ids) for text in encoded)


def _render(fields: EmbeddingFields, encoded: Sequence[EncodedText], vectors: Array) -> bytes:
    """The answer as JSON."""
    entries: list[dict[str, Any]] = []
    for index, vector in enumerate(vectors):
        numbers: Any = vector.tolist()
        if fields.encoding_format == "base64":
            numbers = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        entries.append({"object": "embedding", "index": index, "embedding": numbers})
    tokens = _count_tokens(encoded)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return msgspec.json.encode({"object": "list", "data": entries, "model": fields.model, "usage": usage})
