"""Tasks that change under many threads that use them: every text is of one version, whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec
from helpers.versions import NEW_TOKENS, PROMPT, Versions, tokens

from adalink.runtime import Deployment, Reload
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.tasks.registry import TaskRegistry


def submit_from_threads(versions: Versions, change: Callable[[int], None], opened: Deployment) -> list[Any]:
    """Pairs of texts, of "alpha" and "beta" in one call, of 8 threads that ask while ``change`` exchanges both."""
    pairs, failures, ends = list[Any](), list[str](), threading.Event()

    def ask() -> None:
        try:
            while not ends.is_set():
                rows = opened.generate([PROMPT] * 2, tasks=["alpha", "beta"], max_new_tokens=NEW_TOKENS)
                pairs.append(tuple(row.token_ids for row in rows))
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for step in range(6):
            change(step % 3)
            count = len(pairs)
            while len(pairs) < count + 16 and not failures:
                ends.wait(0.002)
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    assert failures == []
    return pairs


def test_every_text_beside_reloads_is_of_one_state(versions: Versions, opened: Deployment) -> None:
    whole = [tuple(versions.expected(task, version) for task in ("alpha", "beta")) for version in range(3)]

    def change(version: int) -> None:
        versions.export(version, "alpha", "beta")
        opened.reload()

    opened.load_task("alpha")
    opened.load_task("beta")
    pairs = submit_from_threads(versions, change, opened)
    assert set(pairs) == set(whole)


def test_every_text_beside_replacements_is_of_one_adapter(versions: Versions, opened: Deployment) -> None:
    def change(version: int) -> None:
        for task in ("alpha", "beta"):
            opened.add_task(versions.adapter(task, version), task, replace=True)

    pairs = submit_from_threads(versions, change, opened)
    for column, task in enumerate(("alpha", "beta")):
        assert {pair[column] for pair in pairs} == {versions.expected(task, version) for version in range(3)}


def test_a_reload_between_the_tasks_of_a_batch_shows_in_none_or_all(
    versions: Versions, opened: Deployment, monkeypatch: Any
) -> None:
    tokens(opened, "alpha")
    get, asked = opened._tasks.get, list[str]()

    def get_and_reload(name: str) -> Any:
        held = get(name)
        asked.append(name)
        if len(asked) == 1:
            versions.export(1, "alpha", "beta")
            opened.reload()
        return held

    monkeypatch.setattr(opened._tasks, "get", get_and_reload)
    rows = opened.generate([PROMPT] * 2, tasks=["alpha", "beta"], max_new_tokens=NEW_TOKENS)
    assert [row.token_ids for row in rows] == [versions.expected(task, 1) for task in ("alpha", "beta")]
    assert asked == ["alpha", "beta"] * 2


class SlowChanges(TaskRegistry):
    """The planted fault: the tasks are exchanged one after the other."""

    def reload(self, manifest: Manifest) -> Reload:
        for name in ("alpha", "beta"):
            tasks = {**self.manifest.tasks, name: manifest.tasks[name]}
            files = {**self.manifest.files, **manifest.files}
            super().reload(msgspec.structs.replace(self.manifest, tasks=tasks, files=files))
            threading.Event().wait(0.05)
        return Reload()


def test_tasks_exchanged_one_by_one_are_found(versions: Versions, monkeypatch: Any) -> None:
    whole = {tuple(versions.expected(task, version) for task in ("alpha", "beta")) for version in range(3)}
    monkeypatch.setattr("adalink.runtime.deployment.TaskRegistry", SlowChanges)
    with Deployment.open(versions.folder, threads=1) as opened:

        def change(version: int) -> None:
            versions.export(version, "alpha", "beta")
            opened.reload()

        opened.load_task("alpha")
        opened.load_task("beta")
        assert set(submit_from_threads(versions, change, opened)) - whole
