"""A real Chromium, and a tab that notes what a page asks for and what it complains about."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers.paths import REPOSITORY
from helpers.served import wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

# By name on the path, then where macOS has them. CHROMIUM names another one.
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FILES = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)


# Ratio of the luminances of each visible text and what is behind it, as WCAG 2 defines it: [ratio, text].
CONTRAST = """() => {
  const parse = (color) => {
    const [red, green, blue, alpha] = color.match(/[0-9.]+/g).map(Number);
    return [red, green, blue, alpha ?? 1];
  };
  const linear = (one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4;
  const luminance = (color) => {
    const [red, green, blue] = color.map((one) => linear(one / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const color = parse(getComputedStyle(one).backgroundColor);
      if (color[3] === 1) return color;
    }
  };
  // In a picture: the rectangles under the middle of a text, laid over each other.
  const drawn = (text) => {
    const box = text.getBoundingClientRect();
    const [x, y] = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
    let ground = behind(text.closest("svg"));
    for (const shape of text.closest("svg").querySelectorAll("rect")) {
      const { left, right, top, bottom } = shape.getBoundingClientRect();
      if (left > x || x > right || top > y || y > bottom) continue;
      const style = getComputedStyle(shape);
      const [color, share] = [parse(style.fill), Number(style.fillOpacity)];
      ground = ground.map((one, place) => place < 3 ? one + share * (color[place] - one) : 1);
    }
    return ground;
  };
  const ratio = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest("#news")) continue;
    const isDrawn = element instanceof SVGTextElement;
    if (element instanceof SVGElement && !isDrawn) continue;
    const ink = parse(isDrawn ? getComputedStyle(element).fill : getComputedStyle(element).color);
    found.push([ratio(ink, isDrawn ? drawn(element) : behind(element)), walker.currentNode.data.trim()]);
  }
  for (const field of document.querySelectorAll("[placeholder]")) {
    if (!field.checkVisibility()) continue;
    found.push([ratio(parse(getComputedStyle(field, "::placeholder").color), behind(field)), field.placeholder]);
  }
  return found;
}"""


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


class Tab:
    """A page of a server in a browser, which notes what it asks for and what it complains about.

    Attributes:
        page: Playwright's page, which several tests may use one after the other.
        url: the server's address.
        addresses: of every request that the page made.
        complaints: errors of the console and of scripts.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.addresses: list[str] = []
        self.complaints: list[str] = []
        page.on("request", self._note_request)
        page.on("pageerror", self._note_error)
        page.on("console", self._note_line)

    def open(self) -> Tab:
        """Load the page and wait for its form."""
        self.page.goto(self.url)
        self.page.wait_for_selector("#chips label")
        return self

    def leave(self) -> None:
        """Go elsewhere, so that all requests end, and check that the page asked its server alone and had no errors."""
        self.page.goto("about:blank")
        self.page.unroute_all()
        self.page.remove_listener("request", self._note_request)
        self.page.remove_listener("pageerror", self._note_error)
        self.page.remove_listener("console", self._note_line)
        assert [address for address in self.addresses if not address.startswith(self.url)] == []
        assert not self.complaints, self.complaints

    def choose(self, *models: str) -> None:
        """Choose these models and no others."""
        self.page.evaluate(
            "models => document.querySelectorAll('#chips input').forEach((box) => {"
            "box.checked = models.includes(box.value) })",
            models,
        )

    def send(self, text: str, *, chat: bool = True, **settings: Any) -> None:
        """Ask, with ``max_tokens``, ``temperature`` and ``system`` where given; quicker than by mouse and keys."""
        if self.is_chat() != chat:
            self.page.check(f"[name=mode][value={'chat' if chat else 'plain'}]")
        self.page.evaluate(
            "values => { for (const id in values) document.getElementById(id).value = values[id];"
            "document.querySelector('#composer').requestSubmit() }",
            {"prompt": text, **{name: str(value) for name, value in settings.items()}},
        )

    def is_chat(self) -> bool:
        """Whether prompts go through the chat template."""
        return bool(self.page.evaluate("document.querySelector('[name=mode][value=chat]').checked"))

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

    def until(self, script: str, seconds: float = 30) -> None:
        """Wait until an expression is true in the page; Playwright's own way is an ``eval``, which the page forbids."""

        def holds() -> bool:
            if self.page.evaluate(script):
                return True
            self.page.wait_for_timeout(10)  # time for the page itself
            return False

        wait_for(holds, seconds)

    def width(self) -> int:
        """Width of the whole document, beyond the window too."""
        return int(self.page.evaluate("document.documentElement.scrollWidth"))

    def _note_request(self, request: Any) -> None:
        if request.url != "about:blank":
            self.addresses.append(request.url)

    def _note_error(self, error: Any) -> None:
        self.complaints.append(str(error))

    def _note_line(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(f"{message.text} {message.location.get('url')}")


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
    text = (REPOSITORY / "serving/endpoints/page/page.js").read_text(encoding="utf-8")
    assert text.count(good) == 1
    headers = {"Content-Type": "text/javascript", "Cache-Control": "no-store"}
    tab.page.route("**/page.js", lambda route: route.fulfill(body=text.replace(good, bad), headers=headers))
    return tab.open()
