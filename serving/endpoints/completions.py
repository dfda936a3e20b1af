"""Generating endpoints: ``/v1/chat/completions`` and ``/v1/completions``, whole or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from adalink.runtime.generation.request import Request
from adalink.runtime.generation.sequence import Generation
from adalink.serving.api_error import ApiError, as_api_error
from adalink.serving.gateway import Gateway
from adalink.serving.json_body import JsonResponse, decode_body, read_body
from adalink.serving.openai.answers import AnswerForm, ChatForm, CompletionForm
from adalink.serving.openai.fields import ChatFields, CompletionFields, GenerateFields
from adalink.serving.openai.inputs import chat_requests, completion_requests
from adalink.serving.running_choices import RunningChoices

# Larger bodies are decoded beside the event loop.
_SMALL_BYTES = 64 << 10
_OUTCOMES = {400: "invalid", 503: "refused", 504: "timeout"}
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies pass events on as they come
]


async def chat_completions(request: HttpRequest) -> Answer:
    """``POST /v1/chat/completions``."""
    gateway: Gateway = request.app.state.gateway
    fields = await read_fields(request, gateway, ChatFields)
    task = gateway.task_of(fields.model)
    texts = gateway.token_texts if fields.logprobs else None
    form = ChatForm(fields.model, fields.n or 1, texts, has_usage=_wants_usage(fields))

    def prepare() -> Sequence[Request]:
        return chat_requests(fields, gateway.base, task, gateway.options.request_seconds)

    return await _answer(gateway, fields, form, prepare)


async def completions(request: HttpRequest) -> Answer:
    """``POST /v1/completions``."""
    gateway: Gateway = request.app.state.gateway
    fields = await read_fields(request, gateway, CompletionFields)
    task = gateway.task_of(fields.model)
    texts = gateway.token_texts if fields.logprobs is not None else None
    form = CompletionForm(fields.model, fields.n or 1, texts, has_usage=_wants_usage(fields))

    def prepare() -> Sequence[Request]:
        return completion_requests(fields, gateway.base, task, gateway.options.request_seconds)

    return await _answer(gateway, fields, form, prepare)


async def read_fields(request: HttpRequest, gateway: Gateway, kind: type[Any]) -> Any:
    """The fields of a request; raises ``ApiError``."""
    body = await read_body(request, gateway.body_bytes, gateway.options.body_seconds)
    if len(body) <= _SMALL_BYTES:
        return decode_body(body, kind)
    return await gateway.in_thread(decode_body, body, kind)


async def _answer(gateway: Gateway, fields: GenerateFields, form: AnswerForm, prepare: Any) -> Answer:
    try:
        running = await gateway.submit(prepare(), fields.model)
    except Exception as error:
        failed = as_api_error(error)
        gateway.metrics.count_request(fields.model, outcome_of(failed))
        raise failed from error
    return Answer(gateway, fields, form, running)


def _wants_usage(fields: GenerateFields) -> bool:
    options = fields.stream_options
    if options is not None and not fields.stream:
        raise ApiError(400, "stream_options needs stream to be true", "stream_options")
    return options is not None and bool(options.include_usage)


def outcome_of(error: ApiError) -> str:
    """How a request has ended, for the metrics."""
    return "shutdown" if error.code == "shutting_down" else _OUTCOMES.get(error.status, "error")


class Answer:
    """The answer to a submitted request, as an ASGI application; it ends with its client."""

    def __init__(self, gateway: Gateway, fields: GenerateFields, form: AnswerForm, running: RunningChoices) -> None:
        self._gateway, self._fields, self._form, self._running = gateway, fields, form, running
        self._has_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; errors after its beginning are events."""
        watcher = asyncio.ensure_future(_leave_with_client(receive, self._running))
        outcome = "cancelled"  # also where this task is
        try:
            if self._fields.stream:
                await self._stream(send)
            else:
                await self._send_whole(scope, receive, send)
            outcome = "cancelled" if self._running.is_left else "ok"
        except Exception as error:
            failed = as_api_error(error)
            outcome = outcome_of(failed)
            if self._has_started:
                await send(_body(_event_bytes(failed.body), more=False))
            else:
                await error_response(failed)(scope, receive, send)
        finally:
            watcher.cancel()
            self._gateway.forget(self._running)
            self._gateway.metrics.count_request(self._fields.model, outcome)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        results = await self._running.results()
        self._count(results)
        await JsonResponse(self._form.whole(results))(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        """Send events; none before the first text or the end, so that what fails until then has its own status."""
        async for chunks in self._chunks():
            if not self._has_started:
                await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                self._has_started = True
            await send(_body(b"".join(_event_bytes(msgspec.json.encode(chunk)) for chunk in chunks), more=True))
        await send(_body(_event_bytes(b"[DONE]"), more=False))

    async def _chunks(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Chunks, with those that can be sent together in one list."""
        form, begun = self._form, set[int]()
        async for pieces in self._running.pieces():
            chunks = []
            for index, piece in pieces:
                if index not in begun:
                    begun.add(index)
                    chunks.append(form.begin(index))
                chunks.append(form.chunk(index, piece))
            if sendable := [chunk for chunk in chunks if chunk is not None]:
                yield sendable
        results = await self._running.results()
        self._count(results)
        last = [form.begin(index) for index in range(len(results)) if index not in begun]
        last += [form.end(index, result) for index, result in enumerate(results)]
        if _wants_usage(self._fields):
            last.append(form.usage(results))
        yield [chunk for chunk in last if chunk is not None]

    def _count(self, results: Sequence[Generation]) -> None:
        metrics, model = self._gateway.metrics, self._fields.model
        for result in results[:: self._fields.n or 1]:
            metrics.count_prompt(model, result)
        for result in results:
            metrics.count_choice(model, result)


def error_response(error: ApiError) -> JsonResponse:
    """The response of an error."""
    return JsonResponse(error.body, error.status, error.headers)


async def _leave_with_client(receive: Receive, running: RunningChoices) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    running.leave()


def _event_bytes(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _body(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}
