"""The page at ``/`` in a real browser: images, encoders, bases without a chat template, and many models."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any

import pytest
from helpers.browser import Tab, events, piece
from helpers.served import Served, serve_in_thread, wait_for
from helpers.vision_deployments import build_vision_deployment, picture

from adalink.runtime import Deployment

PROMPT = "Hello"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = build_vision_deployment(tmp_path_factory.mktemp("llava"))
    with Deployment.open(made.folder, threads=1) as deployment, serve_in_thread(deployment) as server:
        yield server


def png(seed: int) -> bytes:
    file = BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def choose_image(tab: Tab, data: bytes, name: str = "a.png") -> None:
    tab.page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})


def change_state(tab: Tab, **changes: Any) -> None:
    """Let the server say something else about itself."""

    def change(route: Any) -> None:
        route.fulfill(json={**route.fetch().json(), **changes})

    tab.page.route("**/page/state", change)


def test_image_from_disk_is_seen_as_by_generate(blank: Tab, seeing: Served) -> None:
    blank.url = seeing.url
    tab = blank.open()
    tab.choose(seeing.base, "asked")
    answers = []
    for seed in (1, 2):
        choose_image(tab, png(seed), f"{seed}.png")
        tab.page.wait_for_selector(f"#image:has-text('{seed}.png') canvas[width]")
        tab.send("what?", max_tokens=6)
        content = [{"type": "text", "text": "what?"}, {"type": "image", "image": png(seed)}]
        messages = [{"role": "user", "content": content}]
        wanted = seeing.deployment.generate(messages=messages, tasks="asked", max_new_tokens=6)[0].text
        assert tab.text("asked") == wanted
        assert tab.page.locator(".turn canvas").last.get_attribute("aria-label") == f"{seed}.png"
        assert tab.page.locator("#image").is_hidden()
        answers.append(wanted)
        tab.page.click("#restart")
    assert len(set(answers)) == 2


def test_what_is_no_image_is_said(blank: Tab, seeing: Served) -> None:
    tab = blank
    tab.url = seeing.url
    tab.open()
    choose_image(tab, b"no image", "notes.txt")
    tab.page.wait_for_selector("#problem:has-text('notes.txt is no image that this browser can read.')")
    assert tab.page.locator("#image").is_hidden()


def test_image_can_be_removed_and_goes_with_chats_alone(blank: Tab, seeing: Served) -> None:
    blank.url = seeing.url
    tab = blank.open()
    for leave in (lambda: tab.page.click("#remove"), lambda: tab.page.check("[value=plain]")):
        choose_image(tab, png(1))
        tab.page.wait_for_selector("#image canvas[width]")
        leave()
        assert tab.page.locator("#image").is_hidden()
    assert tab.page.locator("#choose").is_hidden()
    tab.send(" ", chat=False)
    assert tab.page.locator("#problem").inner_text() == "Write a prompt first."


def test_base_that_does_not_see_takes_no_image(tab: Tab) -> None:
    assert tab.page.locator("#choose").is_hidden()


def test_encoder_is_said_to_generate_nothing(blank: Tab, served: Served) -> None:
    tab = blank
    change_state(tab, kind="encoder", generates=False)
    tab.page.goto(tab.url)
    tab.page.wait_for_selector("#api-only")
    assert tab.page.locator("#title").inner_text() == f"{served.base} is an encoder: it generates no text"
    assert tab.page.locator("#call").inner_text() == f"POST {served.url}/v2/models/{served.base}/infer"
    assert tab.page.locator("#load").is_visible()
    assert [tab.page.locator(name).is_visible() for name in ("#composer", "#models", "#empty")] == [False] * 3


def test_base_without_a_chat_template_is_asked_plainly(blank: Tab, served: Served) -> None:
    tab = blank
    change_state(tab, chats=False)
    tab.open()
    assert tab.page.locator("#modes").is_hidden()
    tab.choose("alpha")
    tab.page.fill("#prompt", PROMPT)
    tab.page.click("#send")
    assert tab.text("alpha") == served.deployment.generate([PROMPT], tasks="alpha")[0].text


def test_sixth_answer_waits_for_a_connection_and_then_streams(blank: Tab) -> None:
    names = [f"task-{index}" for index in range(20)]
    tab, held = blank, list[Any]()

    def hold(route: Any) -> None:
        held.append(route)

    change_state(tab, models=names, base=names[0])
    tab.page.route("**/v1/**", hold)
    tab.open()
    tab.page.fill("#filter", "task-1")
    shown = [label.inner_text() for label in tab.page.locator("#chips label").all() if label.is_visible()]
    assert shown == ["task-1", *(f"task-1{index}" for index in range(10))]
    tab.page.fill("#filter", "")
    tab.choose(*names[:7])
    tab.send(PROMPT)
    tab.until("document.querySelectorAll('article').length === 7")
    stats = [text.replace("\u00a0", " ") for text in tab.page.locator(".stats").all_inner_texts()]
    assert stats == ["reads the prompt"] * 5 + ["waits for a connection"] * 2
    for done in range(7):
        wait_for(lambda done=done: tab.page.evaluate("1") and len(held) > done)
        held[done].fulfill(**events(piece(f"answer {done}"), piece("", "stop")))
    tab.wait()
    assert tab.page.locator(".text").all_inner_texts() == [f"answer {done}" for done in range(7)]


def test_models_that_come_and_go_are_offered(blank: Tab, served: Served) -> None:
    tab = blank.open()
    tab.choose("beta", "double")
    change_state(tab, models=[served.base, "beta", "new"])
    tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # the load is read at once
    tab.page.wait_for_selector("#chips label:has-text('new')")
    assert tab.page.locator("#chips label").count() == 3
    assert tab.page.evaluate("[...document.querySelectorAll('#chips :checked')].map((box) => box.value)") == ["beta"]
