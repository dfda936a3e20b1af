"""Versions of tasks: adapters that follow each other under one name, and PyTorch's text of each."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.runtime import TASKS, Tiny, random_adapter, write_adapter
from helpers.tiny_tokenizer import CHARACTERS

from adalink.export.adapter.export import export_adapters
from adalink.runtime import Deployment
from adalink.runtime.storage.adapter import Adapter

PROMPT, NEW_TOKENS = "crude oil, 1987", 10


class Versions:
    """A deployment of its own, and adapters that follow each other under the names of its tasks."""

    def __init__(self, tiny: Tiny, root: Path) -> None:
        self.folder = Path(shutil.copytree(tiny.folder, root / "deployment"))
        self.root, self.tiny = root, tiny
        self.texts: dict[tuple[str | None, int], tuple[int, ...]] = {}

    def adapter(self, task: str, version: int) -> Path:
        """The folder of a version of a task's adapter; version 0 is deployed."""
        if version == 0:
            return self.tiny.sources / task
        folder = self.root / "adapters" / f"{task}-{version}"
        if not folder.exists():
            write_adapter(folder, self._made(task, version))
        return folder

    def export(self, version: int, *tasks: str, **options: Any) -> None:
        export_adapters({task: self.adapter(task, version) for task in tasks}, self.folder, replace=True, **options)

    def expected(self, task: str | None, version: int = 0) -> tuple[int, ...]:
        """PyTorch's tokens of ``PROMPT``."""
        if (task, version) not in self.texts:
            adapters = dict(self.tiny.adapters)
            if task is not None and version:
                adapters[task] = self._made(task, version)
            ids = [CHARACTERS.index(character) + 4 for character in PROMPT]
            tokens = replace(self.tiny, adapters=adapters).greedy(ids, task, NEW_TOKENS)
            self.texts[task, version] = tuple(tokens)
        return self.texts[task, version]

    def _made(self, task: str, version: int) -> Adapter:
        fingerprint = self.tiny.adapters["alpha"].config.base_fingerprint
        return random_adapter(fingerprint, 48, 100 + version, **TASKS.get(task, TASKS["alpha"]))


def tokens(deployment: Deployment, task: str | None) -> tuple[int, ...]:
    """The deployment's tokens of ``PROMPT``."""
    return deployment.generate([PROMPT], tasks=task, max_new_tokens=NEW_TOKENS)[0].token_ids
