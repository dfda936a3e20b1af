"""What the server refuses: by status, with OpenAI's error object, which names the field."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from helpers.served import Served, serve_in_thread

from adalink.runtime import BackendError, BackendUnavailableError, Deployment, IntegrityError
from adalink.serving.openai.fields import ChatFields, CompletionFields
from adalink.serving.openai.unsupported import refuse_unsupported

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,YWI="}}


def parts(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"max_tokens": "2"}, "max_tokens", "got `str`"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"max_tokens": True}, "max_tokens", "got `bool`"),
    ({"max_tokens": 5000}, None, "64"),
    ({"temperature": -1}, "temperature", ">= 0"),
    ({"temperature": "hot"}, "temperature", "got `str`"),
    ({"top_p": 2}, "top_p", "<= 1"),
    ({"n": 0}, "n", ">= 1"),
    ({"n": 1000}, "n", "<= 128"),
    ({"seed": -1}, "seed", ">= 0"),
    ({"stop": 5}, "stop", "got `int`"),
    ({"stop": ["a", 5]}, "stop[1]", "got `int`"),
    ({"stream": "yes"}, "stream", "got `str`"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
    ({"presence_penalty": 3}, "presence_penalty", "<= 2"),
    ({"top_k": -2}, "top_k", ">= -1"),
    ({"stop_token_ids": [96]}, "stop_token_ids", "stop_token_ids"),
    ({"tools": {}}, "tools", "got `object`"),
    ({"messages": []}, "messages", "length >= 1"),
    ({"messages": "Hi"}, "messages", "got `str`"),
    ({"messages": [{"content": "Hi"}]}, "messages[0]", "role"),
    ({"messages": [{"role": "user"}]}, "messages[0]", "content"),
    ({"messages": [{"role": "user", "content": "forbidden"}]}, None, "not this word"),
    ({"chat_template_kwargs": {"messages": []}}, None, "messages"),
    (parts({"type": "image", "image": "/etc/passwd"}), "messages[0].content[0]", "'image'"),
    (parts({"type": "image"}), "messages[0].content[0]", "'image'"),
    (parts("Hi"), "messages[0].content[0]", "type"),
    (parts({"type": "image_url", "image_url": {"url": "/etc/passwd"}}), "messages[0].content[0]", "nothing is fetched"),
    (parts({"type": "image_url", "image_url": "http://localhost/"}), "messages[0].content[0]", "nothing is fetched"),
    (parts({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), "messages[0].content[0]", "nothing is"),
    (parts({"type": "text", "text": "What?"}, IMAGE), None, "takes no images"),
]


@pytest.mark.parametrize(("change", "param", "message"), BAD, ids=[str(change)[:60] for change, _, _ in BAD])
def test_bad_request_names_the_field(served: Served, change: Any, param: str | None, message: str) -> None:
    answer = served.post("/v1/chat/completions", {"model": "beta", **CHAT, **change})
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert message in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "/tmp" not in error["message"]


UNSUPPORTED: list[tuple[str, Any]] = [
    ("ignore_eos", True),
    ("best_of", 2),
    ("functions", [{"name": "look"}]),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "look"}}),
    ("chat_template", "{{ messages }}"),
    ("use_beam_search", True),
]


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED)
def test_unsupported_field_is_refused(served: Served, field: str, value: Any) -> None:
    answer = served.post("/v1/chat/completions", {"model": "beta", **CHAT, field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert "not supported" in error["message"]


def test_what_asks_for_nothing_passes() -> None:
    common: dict[str, Any] = {"model": "m", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}
    common |= {"best_of": 1, "ignore_eos": False}
    refuse_unsupported(ChatFields(messages=[], tool_choice="auto", add_special_tokens=False, **common))
    refuse_unsupported(CompletionFields(prompt="", add_special_tokens=True, suffix="", echo=False, **common))


@pytest.mark.parametrize("prompt", [[], ["a", 5], [[1], "a"], 5, [None], [["a"]]], ids=str)
def test_bad_prompt_is_refused(served: Served, prompt: Any) -> None:
    answer = served.post("/v1/completions", {"model": "beta", "prompt": prompt})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("prompt")


def test_unknown_fields_are_ignored(served: Served) -> None:
    body = {"model": "beta", **CHAT}
    plain = served.post("/v1/chat/completions", body).json()
    other = served.post("/v1/chat/completions", {**body, "store": True, "service_tier": "auto", "reasoning": {}}).json()
    assert other["choices"] == plain["choices"]


@pytest.mark.parametrize("model", ["", "x", "Beta", "beta ", "../beta", "base", None, 5])
def test_model_must_be_named(served: Served, model: Any) -> None:
    """A wrong name must never be answered by the base."""
    answer = served.post("/v1/chat/completions", {**CHAT, "model": model})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == "model"


def test_missing_model_is_refused(served: Served) -> None:
    answer = served.post("/v1/chat/completions", CHAT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BackendError("the engine refused /home/me/base/model.onnx"), 500),
        (IntegrityError("/home/me/tasks/a.safetensors was altered"), 500),
        (BackendUnavailableError("/home/me has no Pillow"), 501),
        (ValueError("a bug in /home/me"), 500),
    ],
)
def test_errors_of_the_server_tell_no_path(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(request: Any) -> None:
        raise error

    monkeypatch.setattr(served.deployment, "submit", fail)
    answer = served.post("/v1/chat/completions", {"model": "beta", **CHAT})
    assert answer.status_code == status
    assert "/home" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


def test_full_queue_is_503(served: Served, slow_steps: None) -> None:
    body = {"model": "beta", **CHAT, "n": 60, "max_tokens": 8, "temperature": 1}
    answer = served.post("/v1/chat/completions", body)
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json()["error"]["code"] == "queue_full"


def test_deadline_is_504(opened: Deployment, slow_steps: None) -> None:
    with serve_in_thread(opened, request_seconds=0.1) as server:
        body = {"model": "beta", **CHAT, "max_tokens": 30}
        answer = server.post("/v1/chat/completions", body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        # Once text has been sent, the error is an event, and the end is not that of a whole answer.
        events = server.post("/v1/chat/completions", {**body, "stream": True}).text
        assert '"code":"timeout"' in events
        assert "[DONE]" not in events
        assert server.metric("adalink_requests_total", task="beta", outcome="timeout") == 2


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("DELETE", "/metrics", 405)]
)
def test_wrong_address_is_an_error_object(served: Served, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, served.url + path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
