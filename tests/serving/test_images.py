"""Images as data URLs, for a base that sees."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
from helpers.served import Served, serve_in_thread
from helpers.vision_deployments import build_vision_deployment, picture

from adalink.runtime import Deployment
from adalink.serving.options import IMAGE_BODY_BYTES


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = build_vision_deployment(tmp_path_factory.mktemp("llava"))
    with Deployment.open(made.folder, threads=1) as deployment, serve_in_thread(deployment) as server:
        yield server


def png(seed: int) -> bytes:
    file = BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def ask(server: Served, task: str, data: bytes, kind: str = "png") -> Any:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    content: Any = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
    messages: Any = [{"role": "user", "content": content}]
    return server.openai.chat.completions.create(model=task, messages=messages, max_tokens=6)


@pytest.mark.parametrize("task", ["asked", "base"])
def test_image_is_seen_as_by_generate(seeing: Served, task: str) -> None:
    data, other = png(1), png(2)
    content = [{"type": "text", "text": "what?"}, {"type": "image", "image": data}]
    wanted = seeing.deployment.generate(
        messages=[{"role": "user", "content": content}], tasks=None if task == "base" else task, max_new_tokens=6
    )[0]
    model = seeing.base if task == "base" else task
    reply = ask(seeing, model, data)
    assert reply.choices[0].message.content == wanted.text
    assert reply.usage.prompt_tokens == wanted.prompt_tokens
    assert ask(seeing, model, other).choices[0].message.content != wanted.text


@pytest.mark.parametrize("data", [b"", b"no image", png(1)[:200]], ids=["empty", "text", "cut"])
def test_what_is_no_image_is_refused(seeing: Served, data: bytes) -> None:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"model": seeing.base, "messages": [{"role": "user", "content": content}]}
    answer = seeing.post("/v1/chat/completions", body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_body_may_be_larger_with_images(seeing: Served, served: Served) -> None:
    assert seeing.gateway.body_bytes == IMAGE_BODY_BYTES > served.gateway.body_bytes
