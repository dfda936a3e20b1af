"""AdaLink Kit, by its public API alone; the deployment has one variant, and no end token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime  # noqa: F401  (imports are counted for no engine)

from adalink.runtime import Deployment
from benchmarks.size.accuracy import Row
from benchmarks.size.engines.common import Engine, Settings, main

_BACKENDS = {".onnx": "onnxruntime-cpu", ".gguf": "llama.cpp"}


class KitEngine(Engine):
    """The one variant of a deployment; tasks are deployed in it."""

    packages = ("adalink-kit", "onnxruntime", "numpy")

    def __init__(self, settings: Settings) -> None:
        (graph,) = (path for path in (settings.model / "base").glob("*/model.*") if path.suffix in _BACKENDS)
        backend, variant = _BACKENDS[graph.suffix], graph.parent.name
        self._deployment = Deployment.open(settings.model, backend, variant=variant, threads=settings.threads)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """See ``Engine``; one token a step, as the others."""
        replies = self._deployment.generate(prompts, max_new_tokens=new_tokens, draft_tokens=0)
        return [list(reply.token_ids) for reply in replies]

    def logits(self, task: str, row: Row) -> npt.NDArray[np.float32]:
        """See ``Engine``."""
        scores = self._deployment.run(input_ids=[row.ids], tasks=task)["logits"][0]
        return np.asarray(scores[list(row.positions)], np.float32)


if __name__ == "__main__":
    main(KitEngine)
