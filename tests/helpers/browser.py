"""A real Chromium, and a tab that notes what a page asks for and what it complains about."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.served import wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

# By name on the path, then where macOS has them. CHROMIUM names another one.
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FILES = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome; ``None`` without one."""
    if named := os.environ.get("CHROMIUM"):
        return named
    paths = (*map(shutil.which, NAMES), *(file for file in FILES if Path(file).is_file()))
    return next((path for path in paths if path), None)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser without a window; the test is skipped where none is installed."""
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium or Chrome is installed: `apt-get install chromium`, or set CHROMIUM to its path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@dataclass
class Tab:
    """An open page of a server.

    Attributes:
        page: Playwright's page.
        url: the server's address.
        addresses: of every request that the page made.
        complaints: errors of the console and of scripts.
    """

    page: Page
    url: str
    addresses: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))

    def open(self) -> Tab:
        """Load the page and wait for its form."""
        self.page.goto(self.url)
        self.page.wait_for_selector("#chips label")
        return self

    def choose(self, *models: str) -> None:
        """Choose these models and no others."""
        for box in self.page.locator("#chips input").all():
            box.set_checked(box.get_attribute("value") in models)

    def send(self, text: str, *, chat: bool = True, **settings: Any) -> None:
        """Ask, with ``max_tokens``, ``temperature`` and ``system`` where given."""
        if settings and self.page.locator("#settings").is_hidden():
            self.page.click("#toggle")
        self.page.check(f"[value={'chat' if chat else 'plain'}]")
        for name, value in settings.items():
            self.page.fill(f"#{name}", str(value))
        self.page.fill("#prompt", text)
        self.page.click("#send")

    def answer(self, model: str) -> Locator:
        """The last answer of a model."""
        return self.page.locator(f"article[aria-label={model!r}]").last

    def text(self, model: str) -> str:
        """The text of a model's last answer, once it is complete."""
        self.wait()
        return self.answer(model).locator(".text").text_content() or ""

    def problem(self, model: str) -> str:
        """What went wrong with a model's last answer."""
        self.wait()
        return self.answer(model).locator(".bad").text_content() or ""

    def wait(self) -> None:
        """Wait until no answer is under way."""
        self.until("!document.querySelector('[aria-busy=true]')")

    def until(self, script: str, seconds: float = 8) -> None:
        """Wait until an expression is true in the page; Playwright's own way is an ``eval``, which the page forbids."""
        wait_for(lambda: bool(self.page.evaluate(script)), seconds)

    def width(self) -> int:
        """Width of the whole document, beyond the window too."""
        return int(self.page.evaluate("document.documentElement.scrollWidth"))

    def foreign(self) -> list[str]:
        """Requests that left the server."""
        return [address for address in self.addresses if not address.startswith(f"{self.url}/")]


def events(*chunks: Any, end: str = "data: [DONE]\n\n") -> dict[str, Any]:
    """A response of the server as Playwright fulfils it: a chat that streams chunks."""
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end
    return {"status": 200, "content_type": "text/event-stream", "body": body}


def piece(text: str, reason: str | None = None) -> dict[str, Any]:
    scores = [{"token": text, "logprob": -0.5, "top_logprobs": [{"token": text, "logprob": -0.5}]}]
    delta = {"delta": {"content": text}, "logprobs": {"content": scores}, "finish_reason": reason}
    return {"choices": [delta]}


def route_answer(tab: Tab, text: str, plain: bool = False) -> None:
    """Let the server answer every request with a text."""
    one = piece(text)
    if plain:
        one = {
            "choices": [{"text": text, "logprobs": {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": [{}]}}]
        }
    tab.page.route("**/v1/**", lambda route: route.fulfill(**events(one, piece("", "stop"))))


def assert_all_is_text(tab: Tab) -> None:
    """No element came from a text."""
    assert tab.page.locator(".turn img, .turn b, #news img, .box img").count() == 0
    assert tab.page.title() != "owned"


def plant(tab: Tab, good: str, bad: str) -> Tab:
    """Open the page with a fault in its script."""

    def change(route: Any) -> None:
        response = route.fetch()
        assert response.text().count(good) == 1
        route.fulfill(response=response, body=response.text().replace(good, bad))

    tab.page.route("**/page.js", change)
    return tab.open()
