"""Requests that end early: clients that go away, and servers that end. No slot is lost, no answer is cut in silence."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from helpers.runtime import Tiny
from helpers.served import Served, serve_in_thread, wait_for

from adalink.runtime import Deployment
from adalink.serving.running_choices import RunningChoices
from adalink.tools.common.child_process import python_command

LONG: dict[str, Any] = {"model": "beta", "prompt": "wheat", "max_tokens": 55, "temperature": 1, "seed": 4}
LONG |= {"min_tokens": 55}


def is_free(deployment: Deployment) -> bool:
    return deployment.running == deployment.waiting == 0


def leave(url: str, stream: bool) -> None:
    """Send a long request and go away once it runs."""
    body = {**LONG, "stream": stream}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=0.25) as answer,
    ):
        next(answer.iter_raw())
        time.sleep(0.1)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_client_that_leaves_frees_its_slot(opened: Deployment, slow_steps: None, stream: bool) -> None:
    with serve_in_thread(opened) as server:
        leave(server.url, stream)
        assert wait_for(lambda: is_free(opened)) < 0.2
        wait_for(lambda: server.metric("adalink_requests_total", task="beta", outcome="cancelled") == 1)


def test_slot_that_nobody_frees_is_found(opened: Deployment, slow_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunningChoices, "leave", lambda self: None)
    with serve_in_thread(opened) as server:
        leave(server.url, stream=False)
        assert wait_for(lambda: is_free(opened)) > 0.4


def test_waiting_request_whose_client_leaves_is_dropped(llama: Tiny, slow_steps: None) -> None:
    with Deployment.open(llama.folder, threads=1, slots=1) as one, serve_in_thread(one) as server:
        first = threading.Thread(target=server.post, args=("/v1/completions", LONG))
        first.start()
        wait_for(lambda: one.running == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.1)
        wait_for(lambda: one.waiting == 0)
        assert one.running == 1
        first.join()


def test_running_requests_end_while_new_ones_are_refused(opened: Deployment, slow_steps: None) -> None:
    wanted = opened.generate(["wheat"], tasks=None, max_new_tokens=30)[0].text
    with serve_in_thread(opened) as server:
        body = {"model": server.base, "prompt": "wheat", "max_tokens": 30}
        answers: list[httpx.Response] = []
        bodies = [body, {**body, "stream": True}]
        threads = [
            threading.Thread(target=lambda one=one: answers.append(server.post("/v1/completions", one)))
            for one in bodies
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: opened.running == 2)
        assert server.get("/health/ready").status_code == 200
        server.server.drain()
        wait_for(lambda: server.gateway.is_draining)
        assert server.get("/health/ready").status_code == 503
        assert server.get("/health/live").status_code == 200
        refused = server.post("/v1/completions", body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert opened.running == 2
        for thread in threads:
            thread.join()
        server.thread.join(5)
        assert not server.thread.is_alive()
    texts = [text_of(answer) for answer in answers]
    assert texts == [wanted, wanted]


def text_of(answer: httpx.Response) -> str:
    if answer.headers["content-type"].startswith("application/json"):
        return str(answer.json()["choices"][0]["text"])
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_request_that_outlives_the_drain_ends_with_an_error(opened: Deployment, slow_steps: None, stream: bool) -> None:
    answers: list[httpx.Response] = []
    with serve_in_thread(opened, drain_seconds=0.1) as server:
        ask = threading.Thread(
            target=lambda: answers.append(server.post("/v1/completions", {**LONG, "stream": stream}))
        )
        ask.start()
        wait_for(lambda: opened.running == 1)
        time.sleep(0.1)
        server.server.drain()
        ask.join(5)
        server.thread.join(5)
        assert not server.thread.is_alive()
    (answer,) = answers
    assert answer.status_code == (200 if stream else 503)
    assert '"code":"shutting_down"' in answer.text
    assert "[DONE]" not in answer.text
    assert is_free(opened)


@pytest.fixture(scope="module")
def child(llama: Tiny) -> Iterator[Any]:
    """``adalink serve`` in a process of its own."""
    arguments = ("serve", str(llama.folder), "--port", "0", "--json", "--threads", "1")
    process = subprocess.Popen(
        python_command(module="adalink.tools", arguments=arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_sigterm_in_mid_stream_cuts_nothing(child: Any, served: Served) -> None:
    place = json.loads(child.stdout.readline())
    assert place["models"] == [served.base, *served.deployment.tasks]
    body = {**LONG, "stream": True, "n": 8}
    with httpx.stream("POST", f"{place['url']}/v1/completions", json=body, timeout=20) as answer:
        chunks = answer.iter_text()
        text = next(chunks)
        child.send_signal(signal.SIGTERM)
        text += "".join(chunks)
    lines = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line not in ("", "data: [DONE]")]
    assert text.endswith("data: [DONE]\n\n")
    texts = [""] * 8
    for line in lines:
        texts[line["choices"][0]["index"]] += line["choices"][0]["text"]
    whole = served.post("/v1/completions", {**LONG, "n": 8}).json()
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert child.wait(10) == 0
    assert child.stderr.read() == ""
