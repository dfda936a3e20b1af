"""The page at ``/`` in a real browser: hostile texts, failures, keys and the load."""

from __future__ import annotations

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
def test_html_that_is_written_is_found(blank: Tab, served: Served, good: str) -> None:
    bad = (
        "this.part('.text').innerHTML += delta.content"
        if "append" in good
        else good.replace("textContent", "innerHTML")
    )
    tab = plant(blank, good, bad)
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


FAILURES: list[tuple[dict[str, Any] | None, str]] = [
    (events(piece("part"), end=""), "The answer was cut off before its end."),
    (events(piece("part"), {"error": {"message": HOSTILE}}, end=""), f"{HOSTILE}."),
    ({"status": 502, "body": "<h1>Bad gateway</h1>"}, "The server answered 502 Bad Gateway."),
    (
        {"status": 503, "headers": {"Retry-After": "3"}, "body": '{"error": {"message": "the queue is full"}}'},
        "The queue is full. Try again in 3 s.",
    ),
    (None, "The server does not answer. Is it still running?"),
]


def test_failures_are_said_in_words(tab: Tab) -> None:
    answers = [answer for answer, _ in FAILURES]
    tab.page.route("**/v1/**", lambda route: route.fulfill(**answers[0]) if answers[0] else route.abort())
    tab.choose("alpha")
    for _, words in FAILURES:
        tab.send(PROMPT)
        assert tab.problem("alpha") == words
        assert tab.answer("alpha").locator(".stats").inner_text().endswith("failed")
        answers.pop(0)
    assert_all_is_text(tab)
    tab.complaints.clear()


def test_stream_that_is_cut_without_a_word_is_found(blank: Tab) -> None:
    tab = plant(blank, "if (done) throw new Problem(CUT);", "if (done) return;")
    tab.page.route("**/v1/**", lambda route: route.fulfill(**events(piece("part"), end="")))
    tab.send(PROMPT)
    tab.wait()
    assert tab.page.locator("article .bad").first.text_content() == ""


def test_wrong_input_is_said_before_it_is_sent(tab: Tab) -> None:
    for models, text, settings, words in (
        ([], PROMPT, {}, "Choose at least one model."),
        (["alpha"], " ", {}, "Write a prompt first."),
        (["alpha"], PROMPT, {"temperature": "-1"}, "Temperature: "),
        (["alpha"], PROMPT, {"temperature": "", "max_tokens": "0"}, "Max tokens: "),
    ):
        tab.choose(*models)
        tab.send(text, **settings)
        assert words in tab.page.locator("#problem").inner_text()
    assert tab.page.locator("#settings").is_visible()
    assert tab.page.evaluate("document.activeElement.id") == "max_tokens"
    assert tab.page.locator("article").count() == 0


# Keys and load


def test_key_is_asked_for_and_kept_in_this_tab_alone(blank: Tab, browser: Any, opened: Deployment) -> None:
    with serve_in_thread(opened, api_keys=("secret",)) as server:
        blank.url = server.url
        page = blank.page
        page.goto(server.url)
        for key, then in (("wrong", "#key-problem:has-text('does not know this key')"), ("secret", "#chips label")):
            page.wait_for_selector("#key-dialog[open]")
            page.fill("#key", key)
            page.keyboard.press("Enter")
            page.wait_for_selector(then)
        blank.choose("alpha")
        blank.send(PROMPT, max_tokens=4)
        assert blank.text("alpha")
        kept = "[JSON.stringify(sessionStorage), localStorage.length, document.cookie]"
        assert page.evaluate(kept) == ['{"adalink-key":"secret"}', 0, ""]
        assert "secret" not in page.content() + "".join(blank.addresses)
        page.reload()
        page.wait_for_selector("#chips label")
        other = page.context.new_page()
        other.goto(server.url)
        other.wait_for_selector("#key-dialog[open]")
        other.close()
        page.goto("about:blank")
    assert all("401" in text for text in blank.complaints)
    blank.complaints.clear()


def test_load_is_shown(tab: Tab, served: Served, very_slow_steps: None) -> None:
    assert "0 of 8 slots" in " ".join(tab.page.locator("#load").inner_text().split())
    tab.choose("alpha", "beta")
    tab.send("wheat", chat=False, max_tokens=55)
    tab.until("document.querySelector('#running').textContent === '2'")
    tab.until("document.querySelector('#bar').style.width === '25%'")
    tab.until("Number(document.querySelector('#rate').textContent) > 8")  # two requests, some 12 tokens/s each
    tab.page.keyboard.press("Escape")
    tab.wait()


HIDE = """hidden => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


def polls(tab: Tab, hidden: bool) -> int:
    """How often the page asks for the load in four seconds of its clock."""
    tab.page.evaluate(HIDE, hidden)
    for _ in range(2):
        tab.page.evaluate("fetch('health/live')")  # time for what is under way
    before = len(tab.addresses)
    for _ in range(4):
        tab.page.clock.run_for(1100)
        tab.page.evaluate("fetch('health/live')")
    return sum("page/state" in address for address in tab.addresses[before:])


@pytest.mark.parametrize("is_planted", [False, True])
def test_load_is_not_read_while_the_tab_is_hidden(browser: Any, served: Served, is_planted: bool) -> None:
    tab = Tab(browser.new_page(), served.url)  # its clock stays changed
    tab.page.clock.install()
    if is_planted:
        plant(tab, "if (document.hidden) return;", "")
    else:
        tab.open()
    assert 3 <= polls(tab, hidden=False) <= 5
    assert (polls(tab, hidden=True) > 0) == is_planted
    for hidden in (False, True, False, True):
        tab.page.evaluate(HIDE, hidden)
    assert 3 <= polls(tab, hidden=False) <= 5  # and not once for each time that the tab came into view
    tab.page.close()
