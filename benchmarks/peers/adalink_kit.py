"""AdaLink Kit, by its public API alone.

Kinds: ``base``, ``task``, and ``still``, a task that changes nothing (benchmarks/drafts.py); in 4 bits with ``int4-``
in front, with speculative decoding with ``-drafts`` behind.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime  # noqa: F401  (imports are counted for no peer)

from adalink.runtime import Deployment
from adalink.runtime.generation.speculative_decoding import DRAFT_TOKENS
from benchmarks.peers import common


class KitPeer(common.Peer):
    """A deployment whose base has no end token; its tasks are the adapters."""

    packages = ("adalink-kit", "onnxruntime", "numpy")

    def __init__(self, settings: common.Settings) -> None:
        variant = "int4" if settings.kind.startswith("int4") else None
        self._deployment = Deployment.open(self.folder(settings), threads=settings.threads, variant=variant)
        self._prompt: str | list[int] = settings.text
        self._ids = [settings.prompt]
        self._draft_tokens = DRAFT_TOKENS if settings.kind.endswith("-drafts") else 0
        kind = settings.kind.removesuffix("-drafts")
        self._tasks = self._deployment.tasks
        if kind.endswith("still"):
            self._tasks = (self._deployment.add_task(settings.work / "still"),)
        self.adapters = 0 if kind.endswith("base") else len(self._tasks)
        self._active = self._tasks[0] if self.adapters else None
        if self._active is not None:
            self._deployment.load_task(self._active)

    @staticmethod
    def folder(settings: common.Settings) -> Path:
        """See ``common.Peer``."""
        return settings.work / "deployment"

    def prefill(self) -> None:
        """See ``common.Peer``."""
        self._deployment.run(input_ids=self._ids, tasks=self._active)

    def ask(self, ids: list[int]) -> None:
        """See ``common.Peer``. Tokens, such as a chat's, are taken as they are."""
        self._prompt, self._ids = ids, [ids]

    def generate(self, new_tokens: int) -> list[int]:
        """See ``common.Peer``. The text is encoded and decoded too, which no other peer does."""
        (result,) = self._deployment.generate(
            [self._prompt], tasks=self._active, max_new_tokens=new_tokens, draft_tokens=self._draft_tokens
        )
        if result.prompt_tokens != len(self._ids[0]):
            raise RuntimeError(f"the prompt has {result.prompt_tokens} tokens here, expected {len(self._ids[0])}")
        return list(result.token_ids)

    def weight_bytes(self) -> int:
        """See ``common.Peer``."""
        manifest = self._deployment.manifest
        files = self._deployment.variant.files
        return sum(manifest.files[path].size_bytes for path in files if path.endswith(".data"))

    def switch(self, index: int) -> None:
        """Adapt one token under another task, which is an argument of the call."""
        self._active = self._tasks[index]
        self._deployment.input_embeddings([[0]], tasks=self._active)

    def load(self, index: int) -> None:
        """See ``common.Peer``."""
        self._deployment.load_task(self._tasks[index])

    def disk_bytes(self) -> int:
        """All files of a task."""
        entry = self._deployment.manifest.tasks[self._tasks[0]]
        return sum(self._deployment.manifest.files[path].size_bytes for path in entry.files)


if __name__ == "__main__":
    common.main(KitPeer)
