"""`/v1/embeddings` through OpenAI's own client, against PyTorch."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from helpers.runtime import random_adapter, write_adapter
from helpers.sentences import TEXTS, save_encoder, save_sentence_encoder, sentence_embeddings
from helpers.served import Served, serve_in_thread, wait_for

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import Deployment
from adalink.serving.endpoints import pieces
from adalink.training.adapter_io import load_adapter
from adalink.training.models.loading import load_base, load_tokenizer

SHORT = [text for text in TEXTS if len(text) < 20]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sentences")
    return save_sentence_encoder(
        root / "tiny", save_encoder(root / "plain"), {"pooling_mode": "mean"}, normalize=True, max_seq_length=24
    )


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Iterator[Served]:
    out = checkpoint.parent / "out"
    base = export_base(checkpoint, out).base
    adapter = random_adapter(base.fingerprint, base.hidden_size, 5, rank=3, activation="gelu", bias=True, scope="all")
    export_adapter(write_adapter(checkpoint.parent / "topics", adapter), out)
    with Deployment.open(out, threads=1) as deployment, serve_in_thread(deployment) as server:
        yield server


def vectors_of(answer: Any) -> np.ndarray:
    assert [entry.index for entry in answer.data] == list(range(len(answer.data)))
    return np.array([entry.embedding for entry in answer.data])


def in_pytorch(checkpoint: Path, rows: list[list[int]], task: Path | None) -> np.ndarray:
    model, vectors = load_base(checkpoint), []
    with torch.no_grad():
        if task is not None:
            load_adapter(task, model)
        for ids in rows:
            mean = model(torch.tensor([ids])).last_hidden_state[0].double().mean(0)
            vectors.append((mean / mean.norm()).numpy())
    return np.array(vectors)


@pytest.mark.parametrize("form", ["text", "texts", "ids", "lists of ids"])
@pytest.mark.parametrize("model", ["tiny", "topics"])
def test_vectors_are_those_of_pytorch(encoder: Served, checkpoint: Path, form: str, model: str) -> None:
    rows = [load_tokenizer(checkpoint)(text)["input_ids"] for text in SHORT]
    inputs: dict[str, Any] = {"text": SHORT[1], "texts": SHORT, "ids": rows[1], "lists of ids": rows}
    task = checkpoint.parent / model if model != "tiny" else None
    answer = encoder.openai.embeddings.create(model=model, input=inputs[form])
    wanted = rows if form.endswith("s") and form != "ids" else rows[1:2]
    assert vectors_of(answer) == pytest.approx(in_pytorch(checkpoint, wanted, task), abs=2e-5)
    tokens = sum(map(len, wanted))
    assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == (model, tokens, tokens)


def test_base_is_that_of_sentence_transformers(encoder: Served, checkpoint: Path) -> None:
    answer = encoder.openai.embeddings.create(model="tiny", input=SHORT, encoding_format="float", dimensions=48)
    assert vectors_of(answer) == pytest.approx(sentence_embeddings(checkpoint, SHORT), abs=2e-5)


def test_base64_is_little_endian_float32(encoder: Served) -> None:
    body = {"model": "topics", "input": SHORT}
    plain, packed = (
        encoder.post("/v1/embeddings", {**body, "encoding_format": form}).json() for form in ("float", "base64")
    )
    for one, other in zip(plain["data"], packed["data"], strict=True):
        numbers = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        assert np.array_equal(numbers, np.array(one["embedding"], np.float32))


def test_long_texts_are_refused_or_cut_on_request(encoder: Served, checkpoint: Path) -> None:
    body = {"model": "tiny", "input": ["a", TEXTS[-1]]}
    refused = encoder.post("/v1/embeddings", body)
    assert refused.status_code == 400
    assert "text 1 of input has more than the 24 tokens" in refused.json()["error"]["message"]
    cut = encoder.post("/v1/embeddings", {**body, "truncate_prompt_tokens": -1})
    received = np.array([entry["embedding"] for entry in cut.json()["data"]])
    assert received == pytest.approx(sentence_embeddings(checkpoint, body["input"]), abs=2e-5)


def test_many_texts_in_order(encoder: Served) -> None:
    texts = [f"{index} text" for index in range(150)]
    answer = encoder.openai.embeddings.create(model="topics", input=texts)
    wanted = encoder.deployment.encode(texts, "topics")
    assert vectors_of(answer) == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"dimensions": 47}, 400, "dimensions is 47, and vectors of this model have 48"),
        ({"dimensions": 0}, 400, "dimensions"),
        ({"encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": []}, 400, "input is empty"),
        ({"input": ["a", 5]}, 400, "input is a mixture"),
        ({"input": [[5], []]}, 400, "text 1 has no tokens"),
        ({"input": [[999]]}, 400, "text 0 holds 999"),
        ({"input": None}, 400, "input"),
        ({"input": ["a"] * 2049}, 400, "at most 2048"),
        ({"input": [[5] * 65]}, 400, "65 positions"),
        ({"pooling": "median"}, 400, "pooling is 'median'"),
        ({"model": "nobody"}, 404, "nobody"),
    ],
)
def test_wrong_requests(encoder: Served, changes: dict[str, Any], status: int, message: str) -> None:
    answer = encoder.post("/v1/embeddings", {"model": "tiny", "input": "a", **changes})
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_pooling_may_be_asked_for(encoder: Served) -> None:
    answer = encoder.openai.embeddings.create(
        model="tiny", input=SHORT, extra_body={"pooling": ["cls", "max"], "normalize": False}
    )
    wanted = encoder.deployment.encode(SHORT, pooling=["cls", "max"], normalize=False)
    assert vectors_of(answer) == pytest.approx(wanted, abs=2e-6)


def test_decoder_has_no_embeddings(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="is a decoder"):
        served.openai.embeddings.create(model=served.base, input="a")


def test_requests_are_counted(encoder: Served) -> None:
    before = encoder.metric("adalink_prompt_tokens_total", task="topics")
    answer = encoder.openai.embeddings.create(model="topics", input=SHORT)
    assert encoder.metric("adalink_prompt_tokens_total", task="topics") == before + answer.usage.prompt_tokens
    assert encoder.metric("adalink_requests_total", task="topics", outcome="ok") >= 1


def test_a_client_that_leaves_ends_the_work(encoder: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two pieces of a long request."""
    monkeypatch.setattr(pieces, "_TEXTS_AT_ONCE", 1)
    body = {"model": "topics", "input": ["a b c d e f g"] * 2000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(encoder.url + "/v1/embeddings", json=body, timeout=0.2)
    wait_for(lambda: encoder.metric("adalink_requests_total", task="topics", outcome="cancelled") == 1)
