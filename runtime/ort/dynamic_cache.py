"""Dynamic cache: a call takes the KV cache and returns a longer one (docs/concepts/file-formats.md, "Graphs")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.engine import DecodeState, Engine, InputEmbedder, KvPrefixEngine
from adalink.runtime.generation.padding import move_left, positions_after, positions_of
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
        constant = {name: value for name, value in feeds.items() if name.startswith("encoder_")}
        return DynamicCacheDecodeState(self, self._prefill(feeds), constant, max_new_tokens)

    @implements(KvPrefixEngine)
    def run_after(self, kv_prefixes: Sequence[Array | None], feeds: Mapping[str, Array]) -> Array:
        mask, signature = feeds["attention_mask"], self._signature
        result = np.zeros((*mask.shape, signature.vocab_size), signature.dtype)
        for rows, states in _groups(kv_prefixes, mask):
            own = {name: value[rows] for name, value in feeds.items()}
            if states:
                outputs = self._forward_after(states, own)[0]
                result[rows[:, None], np.nonzero(own["attention_mask"])[1].reshape(len(rows), -1)] = outputs
            else:
                result[rows] = self.run(own)
        return result

    @implements(KvPrefixEngine)
    def start_after(
        self, kv_prefixes: Sequence[Array | None], feeds: Mapping[str, Array], max_new_tokens: int
    ) -> DynamicCacheDecodeState:
        mask = feeds["attention_mask"]
        parts = []
        for rows, states in _groups(kv_prefixes, mask):
            own = {name: value[rows] for name, value in feeds.items()}
            parts.append((rows, self._prefill_after(states, own) if states else self._prefill(own)))
        return DynamicCacheDecodeState(self, self._join(parts, len(mask)), {}, max_new_tokens)

    @implements(KvPrefixEngine)
    def read_states(self, feeds: Mapping[str, Array]) -> Array:
        return np.stack([tensor.numpy()[0] for tensor in self._prefill(feeds).cache])

    def _prefill(self, feeds: Mapping[str, Array]) -> _Prefilled:
        """Run prompts with an empty cache."""
        mask = feeds["attention_mask"]
        positions = feeds.get("position_ids", positions_of(mask))
        output, cache = self.forward({**feeds, "position_ids": positions}, None)
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
        return _Prefilled(mask, positions_after(positions), cache, output[np.arange(len(mask)), last])

    def _prefill_after(self, kv_prefixes: Sequence[Array], feeds: Mapping[str, Array]) -> _Prefilled:
        """Run prompts of one length, each after its KV prefix."""
        output, cache, mask, positions = self._forward_after(kv_prefixes, feeds)
        return _Prefilled(mask, positions[:, -1:] + 1, cache, output[:, -1])

    def _forward_after(
        self, kv_prefixes: Sequence[Array], feeds: Mapping[str, Array]
    ) -> tuple[Array, list[ort.OrtValue], Array, Array]:
        """Run rows of one length, each after its KV prefix, which ends where the row begins.

        A gap between the two would be masked, but a sliding window counts its columns.

        Returns:
            Output and cache of ``forward``, the mask of the cache, and the position of each token.
        """
        embeds, _ = move_left(feeds["inputs_embeds"], feeds["attention_mask"])
        rows, length = embeds.shape[:2]
        before = np.array([states.shape[2] for states in kv_prefixes])[:, None]
        most = int(before.max())
        past = np.zeros(
            (len(self._signature.past), rows, *_shape_of(most, self._signature)), self._signature.cache_dtype
        )
        for row, states in enumerate(kv_prefixes):
            past[:, row, :, most - states.shape[2] :] = states
        mask = (np.arange(most + length) >= most - before).astype(np.int64)
        positions = before + np.arange(length)
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        output, cache = self.forward(inputs, [self._session.value(tensor) for tensor in past])
        return output, cache, mask, positions

    def _join(self, parts: Sequence[tuple[Array, _Prefilled]], batch: int) -> _Prefilled:
        """One batch of prompts that were run apart; ``parts`` are their rows, each ending at the last column."""
        total = max(part.mask.shape[1] for _, part in parts)
        mask, positions = np.zeros((batch, total), np.int64), np.zeros((batch, 1), np.int64)
        logits = np.zeros((batch, self._signature.vocab_size), self._signature.dtype)
        shape = (len(self._signature.past), batch, *_shape_of(total, self._signature))
        cache = np.zeros(shape, self._signature.cache_dtype)
        for rows, part in parts:
            first = total - part.mask.shape[1]
            mask[rows, first:], positions[rows], logits[rows] = part.mask, part.positions, part.logits
            for joined, tensor in zip(cache, part.cache, strict=True):
                joined[rows, :, first:] = tensor.numpy()
        return _Prefilled(mask, positions, [self._session.value(tensor) for tensor in cache], logits)

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


@dataclass(frozen=True, eq=False)
class _Prefilled:
    """Prompts that were run.

    Attributes:
        mask: 1 for positions in the cache that count, shape ``(batch, total)``.
        positions: position of each row's next token, shape ``(batch, 1)``, or ``(batch, 1, axes)``.
        cache: keys and values, one tensor of shape ``(batch, kv_heads, total, head_dim)`` for each.
        logits: shape ``(batch, vocab)``.
    """

    mask: Array
    positions: Array
    cache: list[ort.OrtValue]
    logits: Array


class DynamicCacheDecodeState:
    """See ``adalink.runtime.engine.DecodeState``."""

    def __init__(
        self, engine: DynamicCacheEngine, prompts: _Prefilled, constant: Mapping[str, Array], max_new_tokens: int
    ) -> None:
        """Go on from prompts; ``constant`` are inputs of every step."""
        prompt = prompts.mask
        self._engine = engine
        # Wider when that many tokens have come: few rows use their whole limit, which may be any number.
        self._mask = np.ones((prompt.shape[0], prompt.shape[1] + min(max_new_tokens, _GROWTH)), np.int64)
        self._mask[:, : prompt.shape[1]] = prompt
        self._length = prompt.shape[1]
        self._positions, self._cache, self._logits = prompts.positions, prompts.cache, prompts.logits
        self._constant = dict(constant)
        self._rows = list(range(len(prompt)))

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


def _groups(kv_prefixes: Sequence[Array | None], mask: Array) -> list[tuple[Array, list[Array]]]:
    """Rows that are run together: those without a KV prefix, and those of one length with one.

    Args:
        kv_prefixes: keys and values before each row.
        mask: 1 for tokens, shape ``(batch, seq)``.

    Returns:
        Indices of rows, and their KV prefixes.
    """
    groups: dict[int, list[int]] = {}
    for row, (states, length) in enumerate(zip(kv_prefixes, mask.sum(axis=1).tolist(), strict=True)):
        groups.setdefault(0 if states is None else length, []).append(row)
    return [
        (np.array(rows), [states for row in rows if (states := kv_prefixes[row]) is not None])
        for rows in groups.values()
    ]


def _shape_of(length: int, signature: Signature) -> tuple[int, int, int]:
    """Shape of keys or values of a row in the cache."""
    heads, head_dim = signature.cache_shape
    return heads, length, head_dim
