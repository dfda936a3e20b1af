"""A small real deployment behind a server in a thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
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


@pytest.fixture
def very_slow_steps(slow_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of at least 80 ms: time for a browser to act in the middle of an answer."""
    step = RunningBatch.step

    def slow(self: RunningBatch) -> None:
        time.sleep(0.06)
        step(self)

    monkeypatch.setattr(RunningBatch, "step", slow)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def shared_page(browser: Any) -> Any:
    """One page of a browser for all tests of a module, since a new one takes a quarter of a second."""
    page = browser.new_context(reduced_motion="reduce").new_page()
    page.set_default_timeout(30_000)  # a machine may be busy
    return page


@pytest.fixture
def blank(shared_page: Any, served: Served) -> Iterator[Tab]:
    """A tab that has not loaded its page yet."""
    shared_page.set_viewport_size({"width": 1000, "height": 800})
    tab = Tab(shared_page, served.url)
    yield tab
    tab.leave()


@pytest.fixture
def tab(blank: Tab) -> Tab:
    return blank.open()
