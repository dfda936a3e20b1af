"""A small real deployment behind a server in a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.browser import Tab, open_browser
from helpers.runtime import Tiny, build
from helpers.served import Served, serve_in_thread

from adalink.runtime import Deployment
from adalink.runtime.generation.running_batch import RunningBatch


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build("llama", tmp_path_factory.mktemp("llama"), ("text", "image"))


@pytest.fixture(scope="session")
def opened(llama: Tiny) -> Iterator[Deployment]:
    with Deployment.open(llama.folder, threads=1, slots=8, queue_limit=8) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def served(opened: Deployment) -> Iterator[Served]:
    with serve_in_thread(opened, slots=8) as server:
        yield server


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of at least 20 ms: time to act between two tokens."""
    step = RunningBatch.step

    def slow(self: RunningBatch) -> None:
        time.sleep(0.02)
        step(self)

    def no_drafts(self: Any) -> bool:
        return False

    monkeypatch.setattr(RunningBatch, "step", slow)
    monkeypatch.setattr(RunningBatch, "can_speculate", property(no_drafts))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def new_tab(browser: Any, served: Served) -> Iterator[Callable[..., Tab]]:
    """Opens tabs, and checks at the end that none asked elsewhere or complained."""
    tabs: list[Tab] = []

    def open_tab(url: str = served.url, *, width: int = 1000, **options: Any) -> Tab:
        settings = {"viewport": {"width": width, "height": 800}, "reduced_motion": "reduce"} | options
        context = browser.new_context(**settings)
        context.set_default_timeout(8000)
        tabs.append(Tab(context.new_page(), url))
        return tabs[-1]

    yield open_tab
    for tab in tabs:
        tab.page.context.close()
        assert tab.foreign() == []
        assert tab.complaints == []


@pytest.fixture
def tab(new_tab: Callable[..., Tab]) -> Tab:
    return new_tab().open()
