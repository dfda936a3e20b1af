"""`/v1/classify` through real sockets, against `Deployment.classify`, which is compared with PyTorch elsewhere."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from helpers.heads import make_head_deployment
from helpers.quick import slow_except
from helpers.served import Served, serve_in_thread

from adalink.runtime import Deployment

TEXTS = ["oil", "the price of corn fell in 3 months", "a long text " * 12]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    _, folder, _ = make_head_deployment(tmp_path_factory.mktemp("heads"))
    with Deployment.open(folder, threads=1) as deployment, serve_in_thread(deployment) as server:
        yield server


@pytest.mark.parametrize("task", ["topics", "colours", "rating", "names", "frozen"])
def test_answers_are_those_of_the_deployment(encoder: Served, task: str) -> None:
    pairs: list[Any] = [] if task == "names" else [["oil", "corn"]]
    answer = encoder.post("/v1/classify", {"model": task, "input": [*TEXTS, *pairs]}).json()
    wanted = encoder.deployment.classify([*TEXTS, *map(tuple, pairs)], task)
    assert answer["model"] == task
    assert answer["usage"]["total_tokens"] == sum(one.tokens for one in wanted)
    for index, (entry, one) in enumerate(zip(answer["data"], wanted, strict=True)):
        expected = one.as_record()
        assert entry == {"object": "classification", "index": index, **approximate(expected)}


def approximate(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: approximate(item) for name, item in value.items()}
    if isinstance(value, list):
        return [approximate(item) for item in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


def test_one_text_alone(encoder: Served) -> None:
    (entry,) = encoder.post("/v1/classify", {"model": "topics", "input": "oil"}).json()["data"]
    assert entry["label"] in entry["probabilities"]
    assert sum(entry["probabilities"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "plain"}, 400, "task 'plain' has no labels"),
        ({"model": "tiny"}, 400, "the base model has no labels"),
        ({"model": "nobody"}, 404, "nobody"),
        ({"input": []}, 400, "input has 0 texts"),
        ({"input": ["a"] * 2049}, 400, "input has 2049 texts"),
        ({"input": [["a"]]}, 400, "input[0] has 1 texts"),
        ({"input": [5]}, 400, "input"),
        ({"model": "names", "input": [["a", "b"]]}, 400, "is a pair"),
        ({"labels": ["a", "b"]}, 400, "this one has a head"),
        ({"calibration": "N/A"}, 400, "this one has a head"),
    ],
)
def test_wrong_requests(encoder: Served, changes: dict[str, Any], status: int, message: str) -> None:
    answer = encoder.post("/v1/classify", {"model": "topics", "input": "a", **changes})
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("calibration", [None, "N/A"])
def test_labels_of_the_request(served: Served, calibration: str | None) -> None:
    """On a base that generates: those of the request, and a prompt without content, as `Deployment.classify` has."""
    labels = [" oil", " oil and gas", " wheat"]
    body = {"model": "alpha", "input": TEXTS[:2], "labels": labels}
    answer = served.post("/v1/classify", body | ({"calibration": calibration} if calibration else {})).json()
    wanted = served.deployment.classify(TEXTS[:2], "alpha", labels=labels, calibration=calibration)
    for index, (entry, one) in enumerate(zip(answer["data"], wanted, strict=True)):
        assert entry == {"object": "classification", "index": index, **approximate(one.as_record())}
    plain = served.deployment.classify(TEXTS[:2], "alpha", labels=labels)
    differs = [
        one.probabilities != pytest.approx(other.probabilities, abs=1e-3)
        for one, other in zip(wanted, plain, strict=True)
    ]
    assert differs == [calibration is not None] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [" oil"]}, "expected 2 to"),
        ({"labels": ["oil", " oil"]}, "expected 2 to"),
        ({"labels": ["a", 5]}, "labels"),
        ({"labels": [str(number) for number in range(257)]}, "labels"),
        ({"labels": ["a", "b"], "calibration": 5}, "calibration"),
        ({"labels": ["a", "b"], "calibration": "oil " * 500}, "positions"),
        ({"input": [["a", "b"]], "labels": ["a", "b"]}, "is a pair"),
    ],
)
def test_wrong_labels(served: Served, changes: dict[str, Any], message: str) -> None:
    answer = served.post("/v1/classify", {"model": "alpha", "input": "a", **changes})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_task_has_no_labels(served: Served) -> None:
    answer = served.post("/v1/classify", {"model": "alpha", "input": "a"})
    assert answer.status_code == 400
    assert "has no labels" in answer.json()["error"]["message"]


def test_models_say_their_labels(encoder: Served) -> None:
    entry = encoder.get("/v1/models/topics").json()
    assert (entry["problem_type"], entry["labels"]) == ("single_label_classification", ["oil", "grain", "trade"])
    assert "labels" not in encoder.get("/v1/models/plain").json()


ODD: list[Any] = [
    *(None, True, -1, 0, 2**70, 1e308, "", "\0", "\udc80", "a" * 9000),
    *([], [[]], [None], ["a", 5], [[5, "a"]], {}, [""], [[""]]),
]


@pytest.mark.parametrize("path", slow_except(["/v1/classify", "/v1/embeddings"], "/v1/classify"))
def test_odd_fields_get_typed_answers(encoder: Served, path: str, caplog: pytest.LogCaptureFixture) -> None:
    body = {"model": "topics", "input": "oil", "pooling": "mean"}
    fields = (
        *body,
        "encoding_format",
        "dimensions",
        "normalize",
        "truncate_prompt_tokens",
        "user",
        "labels",
        "calibration",
    )
    with caplog.at_level(logging.ERROR, "adalink"):
        for name in fields:
            for value in ODD:
                content = json.dumps({**body, name: value})
                answer = httpx.post(encoder.url + path, content=content, headers={"Content-Type": "application/json"})
                assert answer.status_code in (200, 400, 404), (name, value, answer.text)
                assert answer.status_code == 200 or answer.json()["error"]["message"]
    assert not caplog.records
