"""Malformed requests: a seeded few hundred, on real sockets. Each gets a typed answer, and the log stays empty."""

from __future__ import annotations

import json
import logging
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.served import Served, serve_in_thread

from adalink.runtime import Deployment
from adalink.serving.endpoints import completions as generating

CHAT: dict[str, Any] = {
    "model": "beta",
    "messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["x"],
    "stream": False,
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [{"type": "function", "function": {"name": "look"}}],
    "stream_options": None,
    "logit_bias": {},
    "chat_template_kwargs": {"enable_thinking": False},
}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "beta", "prompt": ["a", "b"], "max_tokens": 2, "n": 1, "logprobs": 1}),
    ("/tokenize", {"prompt": "a", "model": "beta"}),
    ("/detokenize", {"tokens": [5, 6]}),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b"}),
    ("/v1/unload_lora_adapter", {"lora_name": "a"}),
]
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        10**18,
        -(10**18),
        2**64,
        1e308,
        -0.5,
        "",
        "a",
        "\0",
        "é\N{GRINNING FACE}",
        "\udc80",
    ),
    *([], [[]], [None], ["a", 1], {}, {"": None}, {"a": {"b": []}}, "a" * 3000, [0] * 300, {"type": "image"}),
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
    [{"role": 5, "content": []}],
]


def mutate(body: Any, rng: random.Random) -> Any:
    """A copy with one value, somewhere inside, replaced, removed or added."""
    if isinstance(body, dict) and body and rng.random() < 0.9:
        key = rng.choice(list(body))
        roll = rng.random()
        if roll < 0.1:
            return {name: value for name, value in body.items() if name != key}
        if roll < 0.2:
            return {**body, str(rng.choice(ODD))[:20]: rng.choice(ODD)}
        return {**body, key: mutate(body[key], rng)}
    if isinstance(body, list) and body and rng.random() < 0.6:
        index = rng.randrange(len(body))
        return [*body[:index], mutate(body[index], rng), *body[index + 1 :]]
    return rng.choice(ODD)


def bodies(count: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(11)
    for _ in range(count):
        path, body = rng.choice([("/v1/chat/completions", CHAT)] * 4 + OTHERS)
        for _ in range(rng.randint(1, 3)):
            body = mutate(body, rng)
        data = json.dumps(body).encode()
        if rng.random() < 0.25:  # bytes that are no JSON
            at = rng.randrange(len(data) + 1)
            junk = rng.choice([b"", b"\xff", b"\0", b'"', b"}", b"[" * 500, b'{"a":' * 3000, b"9" * 5000, b"1e999"])
            data = data[:at] + junk + data[at + rng.randint(0, 3) :]
        yield path, data


def heads() -> list[bytes]:
    """What is wrong with HTTP itself."""
    post = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return [
        b"\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http://elsewhere/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /%zz%00%ff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/models/%ff%fe HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"BREW /v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        post + b"Content-Length: -5\r\n\r\n",
        post + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        post + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nabcde",
        post + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n",
        post + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
        post + b"Transfer-Encoding: gzip\r\n\r\nab",
        post + b"Upgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\n{}",
        post + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
        post + b"Content-Length: 100\r\n\r\n{",
        post + b"Content-Length: 2\r\n\r\n{}GARBAGE\r\n\r\n",
        post.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Content-Length: 2\r\n\r\n{}",
    ]


@pytest.fixture(scope="module")
def hard(opened: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tasks")
    with serve_in_thread(
        opened, body_bytes=20_000, header_seconds=0.5, body_seconds=0.5, tasks_folder=folder
    ) as server:
        yield server


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.ERROR)
    return caplog


def exchange(port: int, data: bytes, *, once: bool = False, leave: bool = False) -> bytes:
    """What a server sends for bytes until it closes the connection; the first of it, or nothing for who leaves."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            connection.sendall(data)
            if leave or once:
                return b"" if leave else connection.recv(65536)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
            return answer
        except (BrokenPipeError, ConnectionResetError):
            return b""


def answer_to(port: int, path: str, body: bytes) -> tuple[int, Any]:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
    data = exchange(port, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    first, _, rest = data.partition(b"\r\n")
    return int(first.split()[1]), rest.partition(b"\r\n\r\n")[2]


def test_malformed_bodies_get_typed_answers(hard: Served, log: pytest.LogCaptureFixture) -> None:
    statuses: dict[int, int] = {}
    for path, body in bodies(300):
        status, answer = answer_to(hard.port, path, body)
        statuses[status] = statuses.get(status, 0) + 1
        assert status < 500 or b"queue_full" in answer, (path, body[:300], answer)
        if status >= 400:
            error = json.loads(answer)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
    assert statuses[400] > 150
    assert statuses[200] > 10
    assert log.messages == []


def test_malformed_http_ends_in_order_while_others_are_served(hard: Served, log: pytest.LogCaptureFixture) -> None:
    wanted = hard.post("/v1/completions", {"model": "beta", "prompt": "wheat", "max_tokens": 40}).json()["choices"]
    is_over, others = threading.Event(), []

    def ask_on() -> None:
        while not is_over.is_set():
            body = {"model": "beta", "prompt": "wheat", "max_tokens": 40}
            others.append(hard.post("/v1/completions", body).json()["choices"] == wanted)

    thread = threading.Thread(target=ask_on)
    thread.start()
    try:
        for data in heads():
            answer = exchange(hard.port, data, once=True)
            assert answer == b"" or answer.startswith(b"HTTP/1.1"), data
            exchange(hard.port, data, leave=True)
    finally:
        is_over.set()
        thread.join()
    assert len(others) > 3
    assert all(others)
    assert log.messages == []


def test_bug_would_be_found(hard: Served, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(generating, "decode_body", fail)
    status, answer = answer_to(hard.port, "/v1/completions", b"{}")
    assert status == 500
    assert json.loads(answer)["error"]["code"] == "internal_error"
    assert log.records
    assert all(record.exc_info for record in log.records)
