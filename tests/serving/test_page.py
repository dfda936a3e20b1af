"""The page at ``/`` in a real browser: what it asks and shows is what the server says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers.browser import Tab, plant
from helpers.chats import make_chat_deployment
from helpers.runtime import Tiny
from helpers.served import Served, serve_in_thread, wait_for

from adalink.runtime import Deployment

PROMPT = "Hello"


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_answers_are_those_of_generate(tab: Tab, served: Served, chat: bool) -> None:
    names = [served.base, "alpha", "beta"]
    tab.choose(*names)
    tab.send(PROMPT, chat=chat, max_tokens=20)
    prompt: Any = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompts": [PROMPT]}
    for name in names:
        wanted = served.deployment.generate(**prompt, tasks=None if name == served.base else name, max_new_tokens=20)
        assert tab.text(name) == wanted[0].text
        stats = tab.answer(name).locator(".stats").inner_text().replace("\u00a0", " ")
        assert f"{len(wanted[0].token_ids)} token" in stats
        assert "first token 0." in stats
        assert "tokens/s" in stats
    assert len({tab.text(name) for name in names}) == 3


def test_answer_under_the_wrong_name_is_found(blank: Tab, served: Served) -> None:
    tab = plant(blank, "model: this.model, stream", "model: 'beta', stream")
    tab.choose("alpha")
    tab.send(PROMPT, max_tokens=20)
    messages = [{"role": "user", "content": PROMPT}]
    assert tab.text("alpha") != served.deployment.generate(messages=messages, tasks="alpha", max_new_tokens=20)[0].text


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_first_token_has_the_probabilities_of_pytorch(tab: Tab, served: Served, llama: Tiny, chat: bool) -> None:
    tab.choose("alpha")
    tab.send(PROMPT, chat=chat, max_tokens=2)
    tab.wait()
    tab.answer("alpha").locator("summary").click()
    tokenizer = served.deployment.tokenizer
    ids = tokenizer.encode_messages([{"role": "user", "content": PROMPT}]) if chat else tokenizer.encode(PROMPT)
    logits = llama.logits(list(ids), "alpha")[-1].astype(np.float64)
    shares = 100 * np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    rows = [row.split() for row in tab.answer("alpha").locator("li").all_inner_texts()]
    likeliest = np.argsort(-shares)[:5]
    assert [row[0].replace("␣", " ") for row in rows] == [served.gateway.token_texts.text(int(id)) for id in likeliest]
    assert [float(row[-1].rstrip("%")) for row in rows] == pytest.approx(shares[likeliest], abs=0.06)


def test_answer_streams(tab: Tab, served: Served, slow_steps: None) -> None:
    tab.choose(served.base)
    tab.send("wheat", chat=False, max_tokens=55)
    tab.until("document.querySelector('.text').textContent.length > 2")
    begun = tab.answer(served.base).locator(".text").text_content() or ""
    assert tab.page.locator("[aria-busy=true]").count() == 1
    assert 2 < len(begun) < len(tab.text(served.base))
    assert tab.text(served.base).startswith(begun)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A deployment of more positions, for several turns."""
    folder = make_chat_deployment(tmp_path_factory.mktemp("chat"))
    with Deployment.open(folder, threads=1) as deployment, serve_in_thread(deployment) as server:
        yield server


def test_next_turn_has_the_turns_before_and_the_system_prompt(blank: Tab, chatting: Served) -> None:
    blank.url, generate = chatting.url, chatting.deployment.generate
    tab = blank.open()
    tasks = {chatting.base: None, "beta": "beta"}
    tab.choose(*tasks)
    messages: dict[str, list[Any]] = {name: [{"role": "system", "content": "Be brief."}] for name in tasks}
    for text in ("Hello", "And wheat?"):
        tab.send(text, max_tokens=6, system="Be brief.")
        for name, said in messages.items():
            said.append({"role": "user", "content": text})
            wanted = generate(messages=said, tasks=tasks[name], max_new_tokens=6)[0].text
            assert tab.text(name) == wanted
            said.append({"role": "assistant", "content": wanted})
    tab.page.click("#restart")
    assert tab.page.locator("article").count() == 0
    tab.send("And wheat?", max_tokens=6, system="")
    anew = [{"role": "user", "content": "And wheat?"}]
    assert tab.text("beta") == generate(messages=anew, tasks="beta", max_new_tokens=6)[0].text
    # Else a page that forgets would pass.
    assert tab.text("beta") != messages["beta"][-1]["content"]


# Stopping


def test_stop_frees_the_slot(tab: Tab, served: Served, very_slow_steps: None) -> None:
    tab.choose("alpha", "beta")
    tab.send("wheat", chat=False, max_tokens=50)
    wait_for(lambda: served.deployment.running == 2)
    tab.until("document.querySelectorAll('.stats')[0].textContent.includes('first')")
    tab.answer("alpha").locator(".stop").click()
    wait_for(lambda: served.deployment.running == 1)
    assert tab.answer("alpha").locator(".stats").inner_text().endswith("stopped")
    assert tab.answer("alpha").locator(".text").text_content()
    assert tab.answer("beta").get_attribute("aria-busy") == "true"
    tab.page.click("#stop-all")
    wait_for(lambda: served.deployment.running == 0)
    tab.wait()
    assert tab.page.locator("#send").is_visible()
    assert tab.page.evaluate("document.activeElement.id") == "prompt"


def test_stop_that_frees_no_slot_is_found(blank: Tab, served: Served, slow_steps: None) -> None:
    tab = plant(blank, "signal: this.control.signal }", "}")
    tab.choose("alpha")
    tab.send("wheat", chat=False, max_tokens=35)
    wait_for(lambda: served.deployment.running == 1)
    tab.page.click("#stop-all")
    with pytest.raises(AssertionError):
        wait_for(lambda: served.deployment.running == 0, 0.3)
    tab.wait()


def test_keyboard_alone_does_it_all(tab: Tab, served: Served, very_slow_steps: None) -> None:
    keys = tab.page.keyboard
    assert tab.page.evaluate("document.activeElement.id") == "prompt"
    for _ in range(len(served.deployment.tasks) + 1):
        keys.press("Shift+Tab")
    wanted = {}
    for name in (served.base, *served.deployment.tasks):
        assert tab.page.evaluate("document.activeElement.value") == name
        wanted[name] = name in (served.base, "beta")
        if tab.page.evaluate("document.activeElement.checked") != wanted[name]:
            keys.press("Space")
        keys.press("Tab")
    keys.type("wheat\nand corn")
    keys.press("Control+Enter")
    tab.until("document.querySelectorAll('[aria-busy=true]').length === 2")
    wait_for(lambda: served.deployment.running == 2)
    keys.press("Escape")
    wait_for(lambda: served.deployment.running == 0)
    tab.wait()
    asked = [article.get_attribute("aria-label") for article in tab.page.locator("article").all()]
    assert asked == [name for name, is_chosen in wanted.items() if is_chosen]
    assert tab.page.locator(".turn > p").inner_text() == "wheat\nand corn"
