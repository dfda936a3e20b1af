"""``/tokenize`` and ``/detokenize``, as vLLM has them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest

from adalink.serving.api_error import ApiError
from adalink.serving.endpoints.completions import read_fields
from adalink.serving.gateway import Gateway
from adalink.serving.json_body import JsonResponse
from adalink.serving.openai.conversations import chat_options, check_parts
from adalink.serving.openai.fields import DetokenizeFields, TokenizeFields


async def tokenize(request: HttpRequest) -> JsonResponse:
    """``POST /tokenize``: token ids of a prompt or a conversation; images are their placeholders."""
    gateway: Gateway = request.app.state.gateway
    fields: TokenizeFields = await read_fields(request, gateway, TokenizeFields)
    task = None if fields.model is None else gateway.task_of(fields.model)
    answer: dict[str, Any] = await gateway.with_tasks(_tokenize, gateway, fields, task)
    return JsonResponse(answer)


async def detokenize(request: HttpRequest) -> JsonResponse:
    """``POST /detokenize``: text of token ids, without special tokens."""
    gateway: Gateway = request.app.state.gateway
    fields: DetokenizeFields = await read_fields(request, gateway, DetokenizeFields)
    if fields.model is not None:
        gateway.task_of(fields.model)
    size = gateway.base.vocab_size
    if bad := [token for token in fields.tokens if token >= size]:
        raise ApiError(400, f"tokens holds {bad[0]}, expected token ids from 0 to {size - 1}", "tokens")
    text: str = await gateway.in_thread(gateway.deployment.tokenizer.decode, fields.tokens)
    return JsonResponse({"prompt": text})


def _tokenize(gateway: Gateway, fields: TokenizeFields, task: str | None) -> dict[str, Any]:
    tokenizer = gateway.deployment.tokenizer
    if (fields.prompt is None) == (fields.messages is None):
        raise ApiError(400, "give either prompt or messages", "prompt")
    is_default = fields.messages is None  # a chat template writes its special tokens itself
    if fields.add_special_tokens not in (None, is_default):
        raise ApiError(
            400, f"add_special_tokens is {fields.add_special_tokens}, which is not supported here", "add_special_tokens"
        )
    if fields.messages is not None:
        check_parts(fields.messages)
        tokens = tokenizer.encode_messages(fields.messages, chat_options(fields))
    else:
        assert fields.prompt is not None
        tokens = gateway.deployment.encode_prompt(fields.prompt, task)
    texts = [gateway.token_texts.text(token) for token in tokens] if fields.return_token_strs else None
    return {"count": len(tokens), "max_model_len": gateway.max_positions, "tokens": tokens, "token_strs": texts}
