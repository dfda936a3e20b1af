"""The page at ``/`` in a real browser: hostile texts, failures, keys and the load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from helpers.browser import Tab, assert_all_is_text, events, piece, plant, route_answer
from helpers.served import Served, serve_in_thread

from adalink.runtime import Deployment

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>&amp;"
PROMPT = "Hello"


# What is said is text


@pytest.mark.parametrize("plain", [False, True], ids=["chat", "plain"])
def test_hostile_answers_stay_text(tab: Tab, served: Served, plain: bool) -> None:
    route_answer(tab, HOSTILE, plain)
    tab.choose(served.base)
    tab.send(HOSTILE, chat=not plain)
    assert tab.text(served.base) == HOSTILE
    assert tab.page.locator(".turn > p").text_content() == HOSTILE
    assert tab.page.locator("li code").text_content() == HOSTILE.replace(" ", "␣")
    assert_all_is_text(tab)


@pytest.mark.parametrize(
    "good", ['this.text.appendData(delta?.content ?? text ?? "")', "section.children[1].textContent = text"]
)
def test_html_that_is_written_is_found(new_tab: Callable[..., Tab], served: Served, good: str) -> None:
    bad = (
        "this.part('.text').innerHTML += delta.content"
        if "append" in good
        else good.replace("textContent", "innerHTML")
    )
    tab = plant(new_tab(), good, bad)
    route_answer(tab, HOSTILE)
    tab.choose(served.base)
    tab.send(HOSTILE)
    tab.wait()
    with pytest.raises(AssertionError):
        assert_all_is_text(tab)
    assert tab.page.title() != "owned"  # since the policy of the page lets nothing inline run
    tab.complaints.clear()  # the browser says so


# Errors in words


def test_refusal_of_the_server_is_shown(tab: Tab, served: Served) -> None:
    tab.choose("alpha")
    tab.send(PROMPT, max_tokens=999)
    assert "64: shorten the prompt or ask for fewer new tokens." in tab.problem("alpha")
    assert tab.page.locator("#prompt").input_value() == PROMPT  # to be sent again
    assert [text[:36] for text in tab.complaints] == ["Failed to load resource: the server "]
    tab.complaints.clear()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (events(piece("part"), end=""), "The answer was cut off before its end."),
        (events(piece("part"), {"error": {"message": HOSTILE}}, end=""), f"{HOSTILE}."),
        ({"status": 502, "body": "<h1>Bad gateway</h1>"}, "The server answered 502 Bad Gateway."),
        (
            {"status": 503, "headers": {"Retry-After": "3"}, "body": '{"error": {"message": "the queue is full"}}'},
            "The queue is full. Try again in 3 s.",
        ),
        (None, "The server does not answer. Is it still running?"),
    ],
    ids=["cut", "error in the stream", "proxy", "full", "gone"],
)
def test_failure_is_said_in_words(tab: Tab, answer: dict[str, Any] | None, words: str) -> None:
    tab.page.route("**/v1/**", lambda route: route.abort() if answer is None else route.fulfill(**answer))
    tab.choose("alpha")
    tab.send(PROMPT)
    assert tab.problem("alpha") == words
    assert tab.answer("alpha").locator(".stats").inner_text().endswith("failed")
    assert_all_is_text(tab)
    tab.complaints.clear()


def test_stream_that_is_cut_without_a_word_is_found(new_tab: Callable[..., Tab]) -> None:
    tab = plant(new_tab(), "if (done) throw new Problem(CUT);", "if (done) return;")
    tab.page.route("**/v1/**", lambda route: route.fulfill(**events(piece("part"), end="")))
    tab.send(PROMPT)
    tab.wait()
    assert tab.page.locator("article .bad").first.text_content() == ""


@pytest.mark.parametrize(
    ("models", "text", "settings", "words"),
    [
        ([], PROMPT, {}, "Choose at least one model."),
        (["alpha"], " ", {}, "Write a prompt first."),
        (["alpha"], PROMPT, {"temperature": "-1"}, "Temperature: "),
        (["alpha"], PROMPT, {"max_tokens": "0"}, "Max tokens: "),
    ],
)
def test_wrong_input_is_said_before_it_is_sent(
    tab: Tab, models: list[str], text: str, settings: dict[str, str], words: str
) -> None:
    tab.choose(*models)
    tab.send(text, **settings)
    assert words in tab.page.locator("#problem").inner_text()
    assert tab.page.locator("article").count() == 0


# Keys and load


def test_key_is_asked_for_and_kept_in_this_tab_alone(new_tab: Callable[..., Tab], opened: Deployment) -> None:
    with serve_in_thread(opened, api_keys=("secret",)) as server:
        tab = new_tab(server.url)
        tab.page.goto(server.url)
        for key, is_right in (("wrong", False), ("secret", True)):
            tab.page.wait_for_selector("#key-dialog[open]")
            tab.page.fill("#key", key)
            tab.page.keyboard.press("Enter")
            selector = "#chips label" if is_right else "#key-problem:has-text('does not know this key')"
            tab.page.wait_for_selector(selector)
        tab.choose("alpha")
        tab.send(PROMPT, max_tokens=4)
        assert tab.text("alpha")
        kept = "[JSON.stringify(sessionStorage), localStorage.length, document.cookie]"
        assert tab.page.evaluate(kept) == ['{"adalink-key":"secret"}', 0, ""]
        assert "secret" not in tab.page.content() + "".join(tab.addresses)
        tab.page.reload()
        tab.page.wait_for_selector("#chips label")
        other = new_tab(server.url)
        other.page.goto(server.url)
        other.page.wait_for_selector("#key-dialog[open]")
    for each in (tab, other):
        assert all("401" in text or "ERR_" in text for text in each.complaints)
        each.complaints.clear()


def test_load_is_shown(tab: Tab, served: Served, slow_steps: None) -> None:
    assert "0 of 8 slots" in " ".join(tab.page.locator("#load").inner_text().split())
    tab.choose("alpha", "beta")
    tab.send("wheat", chat=False, max_tokens=55)
    tab.until("document.querySelector('#running').textContent === '2'")
    assert tab.page.evaluate("document.querySelector('#bar').style.width") == "25%"
    tab.until("Number(document.querySelector('#rate').textContent) > 20")
    tab.page.keyboard.press("Escape")
    tab.wait()


def test_load_is_not_read_while_the_tab_is_hidden(new_tab: Callable[..., Tab]) -> None:
    tab = new_tab()
    tab.page.clock.install()
    tab.open()

    def polls(hidden: bool) -> int:
        tab.page.evaluate(
            "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
            "document.dispatchEvent(new Event('visibilitychange')); }",
            hidden,
        )
        tab.page.wait_for_load_state("networkidle")
        before = len(tab.addresses)
        for _ in range(4):
            tab.page.clock.run_for(1100)
            tab.page.evaluate("fetch('health/live')")  # time for what is under way
        return sum("page/state" in address for address in tab.addresses[before:])

    assert polls(hidden=False) in (3, 4)
    assert polls(hidden=True) == 0
    assert polls(hidden=False) in (3, 4)
