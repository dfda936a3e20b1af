"""llama.cpp alone, by the kit's bindings; for a task it is fed adapted embeddings in place of tokens."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

from adalink.runtime.llama_cpp.context import LlamaContext, LlamaModel
from adalink.runtime.llama_cpp.structures import F16
from benchmarks.size.accuracy import HostEmbedder, Row
from benchmarks.size.engines.common import Engine, Settings, main


class LlamaEngine(Engine):
    """One KV cache for each number of rows; the tokens of all rows are one pass."""

    packages = ("xllamacpp", "numpy")

    def __init__(self, settings: Settings) -> None:
        self._settings, self._model = settings, LlamaModel(settings.model)
        self._contexts = {1: LlamaContext(self._model, 1, settings.context, settings.threads, F16)}
        self._embed: HostEmbedder | None = None
        if settings.adapters is not None:
            (table,) = (t for t in gguf.GGUFReader(settings.model).tensors if t.name == "token_embd.weight")
            self._embed = HostEmbedder.read(gguf.quants.dequantize(table.data, table.tensor_type), settings.adapters)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """See ``Engine``."""
        rows = len(prompts)
        if rows not in self._contexts:
            size = self._settings.batch_context
            self._contexts[rows] = LlamaContext(self._model, rows, size, self._settings.threads, F16)
        context, length = self._contexts[rows], len(prompts[0])
        for row in range(rows):
            context.cut(row)
        owners = [row for row in range(rows) for _ in range(length)]
        lasts = [length * (row + 1) - 1 for row in range(rows)]
        tokens = context.decode(np.concatenate(prompts), owners, [*range(length)] * rows, lasts).argmax(1)
        replies = [tokens]
        for position in range(length, length + new_tokens - 1):
            tokens = context.decode(tokens, range(rows), [position] * rows, range(rows)).argmax(1)
            replies.append(tokens)
        return [[int(token) for token in reply] for reply in zip(*replies, strict=True)]

    def logits(self, task: str, row: Row) -> npt.NDArray[np.float32]:
        """See ``Engine``."""
        assert self._embed is not None
        context, count = self._contexts[1], len(row.ids)
        context.cut(0)
        return context.decode(self._embed(task, row.ids), [0] * count, range(count), row.positions)


if __name__ == "__main__":
    main(LlamaEngine)
