"""The page of an exported folder in a real browser, without a GPU: tokens, tasks, progress, faults and looks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import CONTRAST, open_browser
from helpers.served import wait_for
from helpers.sites import installed_modules, serve_folder

from adalink.export.web.export import export_web
from adalink.runtime import Deployment, SamplingParams

PROMPT = "A tea, then 3 oaks"


@pytest.fixture(scope="module")
def folder(site: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the libraries."""
    out = tmp_path_factory.mktemp("page") / "site"
    export_web(site.deployment, out, libraries=installed_modules("examples/web"))
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


class Page:
    """The page in a tab, and what it complains about."""

    def __init__(self, browser: Any, url: str) -> None:
        self.tab = browser.new_page()
        self.tab.set_default_timeout(60_000)  # a machine may be busy
        self.complaints: list[str] = []
        self.addresses: list[str] = []
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("console", lambda line: self.complaints.append(line.text) if line.type == "error" else None)
        self.tab.on("request", lambda request: self.addresses.append(request.url))
        self.tab.goto(url)

    def until(self, script: str) -> None:
        """Wait until an expression is true; Playwright's own way is an ``eval``, which the page forbids."""
        wait_for(lambda: bool(self.tab.evaluate(script)) or bool(self.tab.wait_for_timeout(10)), 60)

    def wait(self) -> None:
        self.until("document.querySelector('#problem').textContent || !document.querySelector('#form').hidden")
        self.until("document.querySelector('#answer').ariaBusy === 'false'")

    def text(self, id: str) -> str:
        return str(self.tab.text_content(f"#{id}"))

    def ask(self, prompt: str, task: str, tokens: int) -> str:
        self.tab.select_option("#task", task)
        self.tab.fill("#tokens", str(tokens))
        self.tab.fill("#prompt", prompt)
        self.tab.click("#send")
        self.wait()
        return self.text("text")


def test_answers_are_those_of_the_kit(browser, folder, site):
    """Two tasks and the base model, switched in place; then an answer is stopped, and the next one is whole."""
    with Deployment.open(site.deployment, threads=1) as deployment:
        settings = {"max_new_tokens": 12, "sampling": SamplingParams(temperature=0)}
        tasks = [None, "gelu", "relu", None]
        expected = [row.text for row in deployment.generate([PROMPT] * 4, tasks=tasks, **settings)]
    with serve_folder(folder) as url:
        page = Page(browser, url)
        page.wait()
        assert page.text("problem") == ""
        assert page.tab.get_attribute("#bar", "value") == "1"
        assert "WebAssembly" in page.text("where")
        assert [page.ask(PROMPT, task or "", 12) for task in tasks] == expected
        assert len(set(expected)) == 3
        loaded = len(page.addresses)
        assert page.ask("", "relu", 5) == expected[-1]  # an empty prompt is not sent
        assert len(page.addresses) == loaded
        page.tab.fill("#prompt", PROMPT)
        page.tab.evaluate("document.querySelector('#form').requestSubmit(); document.querySelector('#stop').click()")
        page.wait()
        assert page.text("outcome").endswith("stopped")
        begun = page.text("text")  # of the task that is chosen; a busy machine stops some tokens later
        assert expected[2].startswith(begun)
        assert begun != expected[2]
        assert page.ask(PROMPT, "", 12) == expected[-1]
        assert not page.complaints
        assert {address.split("/")[2] for address in page.addresses} == {url.split("/")[2]}
        page.tab.close()


def test_a_truncated_file_is_said(browser, folder, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "site")
    path = damaged / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    with serve_folder(damaged) as url:
        page = Page(browser, url)
        page.wait()
        assert page.text("problem").startswith("model.onnx.data has")
        assert page.tab.get_attribute("#problem", "role") == "alert"
        assert page.tab.is_hidden("#form")
        path.unlink()
        page.tab.reload()
        page.wait()
        assert "model.onnx.data: the server answered 404" in page.text("problem")
        page.tab.close()


def test_page_looks_right_in_both_schemes(browser, folder):
    with serve_folder(folder) as url:
        page = Page(browser, url)
        page.wait()
        page.ask("W" * 40, "gelu", 10)
        for scheme in ("light", "dark"):
            page.tab.emulate_media(color_scheme=scheme)
            ratios = page.tab.evaluate(CONTRAST)
            assert [(text, round(ratio, 2)) for ratio, text in ratios if ratio < 4.5] == []
        for width in (320, 400, 800):
            page.tab.set_viewport_size({"width": width, "height": 800})
            assert page.tab.evaluate("document.documentElement.scrollWidth") == width
        page.tab.click("#prompt")
        seen = []
        for _ in range(6):
            page.tab.keyboard.press("Tab")
            seen.append(page.tab.evaluate("document.activeElement.id"))
        assert "send" in seen
        page.tab.close()


def test_page_names_no_inline_scripts(folder):
    page = (folder / "index.html").read_text()
    assert "onclick" not in page
    assert "<style" not in page
    assert json.loads((folder / "web.json").read_text())["libraries"]
