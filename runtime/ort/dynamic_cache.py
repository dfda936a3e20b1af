"""Dynamic cache: a call takes the KV cache and returns a longer one (docs/concepts/file-formats.md, "Graphs")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.engine import DecodeState, Engine, InputEmbedder
from adalink.runtime.generation.padding import positions_after, positions_of
from adalink.runtime.implements import implements
from adalink.runtime.ort.session import GuardedSession, Signature

if TYPE_CHECKING:
    import onnxruntime as ort

# Columns by which a mask grows.
_GROWTH = 1024


class DynamicCacheEngine:
    """A base graph in one session; the cache is a list of the session's output tensors."""

    def __init__(
        self, session: GuardedSession, signature: Signature, embedder: InputEmbedder, padding_side: str = "left"
    ) -> None:
        """``padding_side`` is ``"right"`` for an encoder, which numbers its positions from the left."""
        self.embedder = embedder
        self.profile = None
        self.padding_side = padding_side
        self._session = session
        self._signature = signature

    @implements(Engine)
    def run(self, feeds: Mapping[str, Array]) -> Array:
        mask = feeds["attention_mask"]
        defaults = {"position_ids": positions_of(mask), "token_type_ids": np.zeros(mask.shape, np.int64)}
        return self.forward({**defaults, **feeds}, None)[0]

    @implements(Engine)
    def start(self, feeds: Mapping[str, Array], max_new_tokens: int) -> DynamicCacheDecodeState:
        return DynamicCacheDecodeState(self, feeds, max_new_tokens)

    @implements(Engine)
    def close(self) -> None:
        self._session.close()

    def forward(
        self, feeds: Mapping[str, Array], cache: Sequence[ort.OrtValue] | None
    ) -> tuple[Array, list[ort.OrtValue]]:
        """Run the graph once; returns its output, and ``cache`` extended by these positions."""
        signature, value = self._signature, self._session.value
        values = {name: value(np.ascontiguousarray(feeds[name])) for name in signature.inputs}
        if signature.past:
            if cache is None:
                heads, head_dim = signature.cache_shape
                empty = np.zeros((len(feeds["inputs_embeds"]), heads, 0, head_dim), signature.cache_dtype)
                cache = [value(empty)] * len(signature.past)
            values.update(zip(signature.past, cache, strict=True))
        names = [signature.output, *signature.present]
        output, *present = self._session.call(lambda session: session.run_with_ort_values(names, values))
        result: Array = output.numpy()
        return result, present

    def take(self, cache: Sequence[ort.OrtValue], rows: list[int]) -> list[ort.OrtValue]:
        """A copy of the cache of ``rows``."""
        return [self._session.value(tensor.numpy()[rows]) for tensor in cache]


class DynamicCacheDecodeState:
    """See ``adalink.runtime.engine.DecodeState``."""

    def __init__(self, engine: DynamicCacheEngine, feeds: Mapping[str, Array], max_new_tokens: int) -> None:
        prompt = feeds["attention_mask"]
        self._engine = engine
        # Wider when that many tokens have come: few rows use their whole limit, which may be any number.
        self._mask = np.ones((prompt.shape[0], prompt.shape[1] + min(max_new_tokens, _GROWTH)), np.int64)
        self._mask[:, : prompt.shape[1]] = prompt
        self._length = prompt.shape[1]
        positions = feeds.get("position_ids", positions_of(prompt))
        self._positions = positions_after(positions)
        self._constant = {name: value for name, value in feeds.items() if name.startswith("encoder_")}
        self._rows = list(range(len(prompt)))
        output, self._cache = engine.forward({**feeds, "position_ids": positions}, None)
        last = prompt.shape[1] - 1 - prompt[:, ::-1].argmax(axis=1)
        self._logits: Array = output[np.arange(len(prompt)), last]

    @property
    @implements(DecodeState)
    def logits(self) -> Array:
        return self._logits

    @implements(DecodeState)
    def step(self, inputs_embeds: Array) -> None:
        if self._rows != list(range(len(self._mask))):
            self._take()
        self._length += 1
        if self._length > self._mask.shape[1]:
            self._mask = np.pad(self._mask, ((0, 0), (0, _GROWTH)), constant_values=1)
        feeds = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": self._mask[:, : self._length],
            "position_ids": self._positions,
            **self._constant,
        }
        output, self._cache = self._engine.forward(feeds, self._cache)
        self._positions = self._positions + 1
        self._logits = output[:, -1]

    def drop(self, row: int) -> None:
        """See ``adalink.runtime.engine.DecodeState``; copies the cache once before the next step."""
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last

    def close(self) -> None:
        """See ``adalink.runtime.engine.DecodeState``; memory is freed with the object."""

    def _take(self) -> None:
        self._cache = self._engine.take(self._cache, self._rows)
        self._mask, self._positions = self._mask[self._rows], self._positions[self._rows]
        self._constant = {name: value[self._rows] for name, value in self._constant.items()}
        self._rows = list(range(len(self._rows)))
