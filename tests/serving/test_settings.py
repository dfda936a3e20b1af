"""Penalties, biases and forms of the text: fields of clients, compared with ``Deployment.submit``."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from helpers.served import Served

from adalink.runtime import Request, SamplingParams, StructuredOutput

# A list: the tiny tokenizer has no closing brace.
SCHEMA = {"type": "array", "items": {"enum": ["oil", "wheat"]}, "minItems": 2, "maxItems": 3}


def submit(served: Served, **settings: Any) -> str:
    request = Request("wheat", task="beta", max_new_tokens=12, **settings)
    return served.deployment.submit(request).result(60).text


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": 2.0}, {"frequency_penalty": 2.0}),
        ({"logit_bias": {"40": 100.0}}, {"logit_bias": {40: 100.0}}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_setting_is_the_runtimes(served: Served, fields: dict[str, Any], sampling: dict[str, Any]) -> None:
    reply = served.openai.completions.create(model="beta", prompt="wheat", max_tokens=12, **fields)
    assert reply.choices[0].text == submit(served, sampling=SamplingParams(**sampling))
    assert reply.choices[0].text != submit(served), "the setting changes something"


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    return isinstance(value, list) and len(value) in (2, 3) and set(value) <= {"oil", "wheat"}


FORMS: list[tuple[dict[str, Any], StructuredOutput, Any]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "news", "schema": SCHEMA}}},
        StructuredOutput(json_schema=SCHEMA),
        is_of_schema,
    ),
    (
        {"structured_outputs": {"regex": "[a-c]{3}"}},
        StructuredOutput(regex="[a-c]{3}"),
        lambda text: re.fullmatch("[a-c]{3}", text),
    ),
    (
        {"guided_choice": ["up", "down"]},
        StructuredOutput(choices=["up", "down"]),
        lambda text: text in ("up", "down"),
    ),
]


@pytest.mark.parametrize(("fields", "form", "is_right"), FORMS, ids=["response_format", "regex", "choice"])
def test_text_has_the_form_asked_for(
    served: Served, fields: dict[str, Any], form: StructuredOutput, is_right: Any
) -> None:
    reply = served.openai.completions.create(model="beta", prompt="wheat", max_tokens=50, extra_body=fields)
    text = reply.choices[0].text
    request = Request("wheat", task="beta", max_new_tokens=50, structured=form)
    assert text == served.deployment.submit(request).result(60).text
    assert reply.choices[0].finish_reason == "stop"
    assert is_right(text)


def test_chat_has_the_form_asked_for(served: Served) -> None:
    reply = served.openai.chat.completions.create(
        model="beta",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "news", "schema": SCHEMA}},
    )
    assert is_of_schema(reply.choices[0].message.content or "")


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"logit_bias": {"oil": 1}}, "logit_bias", "expected token ids"),
    ({"logit_bias": {"5000": 1}}, "logit_bias", "logit_bias"),
    ({"logit_bias": {"5": 200}}, "logit_bias", "logit_bias"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format", "exclude each other"),
    ({"guided_regex": "a("}, None, "regex"),
    ({"guided_regex": 5}, "guided_regex", "got `int`"),
    ({"structured_outputs": 5}, "structured_outputs", "got `int`"),
    ({"structured_outputs": {"yaml": "a"}}, "structured_outputs", "yaml"),
    ({"structured_outputs": {"json": {"type": 7}}}, None, "json_schema"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD, ids=[str(fields)[:60] for fields, _, _ in BAD])
def test_bad_form_is_refused(served: Served, fields: dict[str, Any], param: str | None, message: str) -> None:
    answer = served.post("/v1/completions", {"model": "beta", "prompt": "wheat", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
