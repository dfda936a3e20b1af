"""Structured output and penalties, by the fields of OpenAI and vLLM."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from helpers.served import Served

from adalink.runtime import RequestError, SamplingParams
from adalink.runtime.sampling.structured_output import StructuredOutput

SCHEMA = {"enum": ["oil", 12]}


def ask(server: Served, **changes: Any) -> Any:
    body = {"model": "beta", "prompt": "wheat", "max_tokens": 30, **changes}
    return server.post("/v1/completions", body)


def text(server: Served, **changes: Any) -> str:
    answer = ask(server, **changes)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}},
        {"structured_outputs": {"json": SCHEMA, "regex": None}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
def test_text_follows_the_schema(served: Served, field: Any) -> None:
    assert json.loads(text(served, **field)) in ("oil", 12)


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"guided_choice": ["oil", "corn"]}, "oil|corn"),
        ({"structured_outputs": {"choice": ["oil", "corn"]}}, "oil|corn"),
        ({"guided_grammar": 'start: "a" "b"'}, "ab"),
    ],
)
def test_text_is_of_the_form(served: Served, field: Any, pattern: str) -> None:
    assert re.fullmatch(pattern, text(served, **field))


def test_json_object_reaches_the_runtime(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny vocabulary has no closing brace, so no object can be generated."""
    seen = []

    def refuse(request: Any) -> None:
        seen.append(request.structured)
        raise RequestError("seen")

    monkeypatch.setattr(served.deployment, "submit", refuse)
    ask(served, response_format={"type": "json_object"})
    ask(served, structured_outputs={"json_object": True})
    ask(served, response_format={"type": "text"})
    assert seen == [StructuredOutput(json_object=True)] * 2 + [None]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs"),
        ({"structured_outputs": "a"}, "structured_outputs"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
        ({"guided_regex": "(("}, None),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"96": 1}}, "logit_bias"),
    ],
)
def test_wrong_wish_is_refused(served: Served, change: Any, param: str | None) -> None:
    answer = ask(served, **change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_penalties_and_biases_are_those_of_generate(served: Served) -> None:
    plain = served.deployment.generate(["wheat"], tasks="beta", max_new_tokens=30)[0]
    bias = {plain.token_ids[0]: -100.0, 40: 3.5}
    sampling = SamplingParams(presence_penalty=1.5, frequency_penalty=0.5, logit_bias=bias)
    wanted = served.deployment.generate(["wheat"], tasks="beta", max_new_tokens=30, sampling=sampling)[0].text
    found = text(
        served, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={str(token): add for token, add in bias.items()}
    )
    assert found == wanted != plain.text


def test_each_penalty_is_passed_on(served: Served) -> None:
    texts = [
        text(served),
        text(served, presence_penalty=2),
        text(served, frequency_penalty=2),
        text(served, logit_bias={"40": 100}),
    ]
    assert len(set(texts)) == 4
