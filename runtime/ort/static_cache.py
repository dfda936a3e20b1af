"""Static cache: engines on graphs that update their KV cache in place (docs/decisions/0005-decode-loop.md).

A decode state allocates its buffers at the start and binds them to the session once: the token embedding, the logits,
and the cache, whose input and output share an address. A step writes a few numbers and calls the session.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.engine import (
    DecodeState,
    Engine,
    InputEmbedder,
    ResumableDecodeState,
    ResumableEngine,
    SpeculativeDecodeState,
)
from adalink.runtime.errors import RequestError
from adalink.runtime.generation.padding import move_left, positions_after
from adalink.runtime.implements import implements
from adalink.runtime.ort.session import GuardedSession, Signature

# New tokens for which a cache has room at first.
FIRST_TOKENS = 4096


class StaticCacheEngine:
    """A base graph in one session. Rows are padded on the right, so that the cache has no gaps."""

    def __init__(self, session: GuardedSession, signature: Signature, embedder: InputEmbedder) -> None:
        self.embedder = embedder
        self.profile = None
        self.padding_side = "right"
        self._session = session
        self._signature = signature

    @implements(Engine)
    def run(self, feeds: Mapping[str, Array]) -> Array:
        signature, mask = self._signature, feeds["attention_mask"]
        embeds, positions, lengths = _at_left(feeds)
        batch, longest = embeds.shape[:2]
        is_token = np.arange(longest) < lengths[:, None]
        heads, head_dim = signature.cache_shape
        values = {
            "inputs_embeds": embeds,
            "sequence_lengths": lengths,
            "logits_at": np.flatnonzero(is_token),
            "position_ids": positions,
            **dict.fromkeys(signature.past, np.zeros((batch, heads, 0, head_dim), signature.dtype)),
        }
        inputs = {name: values[name] for name in (*signature.inputs, *signature.past)}
        logits: Array = self._session.call(lambda session: session.run([signature.output], inputs))[0]
        if len(logits) == mask.size:
            return logits.reshape(*mask.shape, -1)
        result = np.zeros((*mask.shape, logits.shape[1]), logits.dtype)
        result[mask != 0] = logits
        return result

    @implements(Engine)
    def start(self, feeds: Mapping[str, Array], max_new_tokens: int) -> StaticCacheDecodeState:
        state, embeds, positions, _ = self._allocate(feeds, max_new_tokens)
        state.prefill(embeds, positions)
        return state

    @implements(ResumableEngine)
    def resume(
        self, feeds: Mapping[str, Array], max_new_tokens: int, known: Sequence[Array | None]
    ) -> StaticCacheDecodeState:
        state, embeds, positions, lengths = self._allocate(feeds, max_new_tokens)
        if any(states is not None for states in known):
            for row, states in enumerate(known):
                row_tokens = slice(row, row + 1), slice(lengths[row])
                state.resume(row, embeds[row_tokens], positions[row_tokens], states)
        else:
            state.prefill(embeds, positions)
        return state

    def _allocate(
        self, feeds: Mapping[str, Array], max_new_tokens: int
    ) -> tuple[StaticCacheDecodeState, Array, Array, Array]:
        """A decode state before prefill, with left-aligned embeddings and position ids, and row lengths."""
        embeds, positions, lengths = _at_left(feeds)
        # Larger when that many tokens have come: few rows use their whole limit, which may be any number.
        capacity = embeds.shape[1] + min(max_new_tokens, FIRST_TOKENS)
        state = StaticCacheDecodeState(self._session, self._signature, lengths, positions_after(positions), capacity)
        return state, embeds, positions, lengths

    @implements(Engine)
    def close(self) -> None:
        self._session.close()


class StaticCacheDecodeState:
    """See ``adalink.runtime.engine.DecodeState``. Active rows come first in its buffers, dropped rows last."""

    def __init__(
        self, session: GuardedSession, signature: Signature, lengths: Array, following: Array, capacity: int
    ) -> None:
        """Allocate all buffers.

        Args:
            session: the graph's session.
            signature: the graph's signature.
            lengths: tokens of each row's prompt, int32 with shape ``(batch,)``.
            following: position ids of the tokens that follow, int64 with shape ``(batch, 1)`` or ``(batch, 1, axes)``.
            capacity: tokens of a row, prompt and generated tokens together, that fit the cache at first.
        """
        batch = len(lengths)
        heads, head_dim = signature.cache_shape
        self._session = session
        self._signature = signature
        self._lengths = lengths
        # Positions beyond a row's length are never read and stay uninitialised.
        self._cache = _empty((len(signature.past), batch, heads, capacity, head_dim), signature.dtype)
        self._logits = np.empty((batch, signature.vocab_size), signature.dtype)
        self._logits_indices = np.arange(batch)
        self._positions = following - 1  # a step adds 1
        self._alive = batch
        self._used = int(lengths.max())  # of the longest row there ever was
        # Bound calls: a decode step for the current number of rows, and a verification for each number of tokens.
        self._step: _Bound | None = None
        self._verifications: dict[int, _Bound] = {}

    def prefill(self, inputs_embeds: Array, positions: Array) -> None:
        """Prefill: run the prompts, shape ``(batch, longest, d)``, each row left-aligned."""
        batch, longest = inputs_embeds.shape[:2]
        last = self._logits_indices * longest + self._lengths - 1
        self._run(self._bind(slice(batch), inputs_embeds, positions, last, self._logits))

    def resume(self, row: int, inputs_embeds: Array, positions: Array, states: Array | None) -> None:
        """Prefill one row, shape ``(1, length, d)``, after its cached states.

        With a filled cache, the operator takes several tokens of a single row only. So each row is one call.
        """
        known = 0
        if states is not None:
            known = states.shape[2]
            self._cache[:, row, :, :known] = states
        rest, rest_positions = (np.ascontiguousarray(array[:, known:]) for array in (inputs_embeds, positions))
        row_slice = slice(row, row + 1)
        self._run(self._bind(row_slice, rest, rest_positions, np.array([rest.shape[1] - 1]), self._logits[row_slice]))

    @implements(ResumableDecodeState)
    def states(self, row: int, length: int) -> Array:
        return self._cache[:, row, :, :length].copy()

    @property
    @implements(DecodeState)
    def logits(self) -> Array:
        return self._logits[: self._alive]

    @implements(DecodeState)
    def step(self, inputs_embeds: Array) -> None:
        alive = self._alive
        self._make_room(1)
        if self._step is None or len(self._step.embeds) != alive:
            rows, embeds = slice(alive), np.empty_like(inputs_embeds)
            self._step = self._bind(rows, embeds, self._positions[rows], self._logits_indices[rows], self._logits[rows])
        self._step.embeds[:] = inputs_embeds
        self._positions[:alive] += 1
        self._lengths[:alive] += 1
        self._run(self._step)

    @implements(SpeculativeDecodeState)
    def verify(self, inputs_embeds: Array) -> Array:
        count = inputs_embeds.shape[1]
        self._make_room(count)
        bound = self._verifications.get(count)
        if bound is None:
            logits = np.empty((count, self._signature.vocab_size), self._signature.dtype)
            positions = np.repeat(self._positions[:1], count, axis=1)
            bound = self._bind(slice(1), np.empty_like(inputs_embeds), positions, np.arange(count), logits)
            self._verifications[count] = bound
        bound.embeds[:] = inputs_embeds
        ahead = np.arange(1, count + 1).reshape(1, count, *[1] * (self._positions.ndim - 2))
        np.add(self._positions[:1], ahead, out=bound.positions)
        self._positions[0] += count
        self._lengths[0] += count
        self._run(bound)
        return bound.logits

    def rollback(self, count: int) -> None:
        """See ``adalink.runtime.engine.SpeculativeDecodeState``: positions beyond a row's length are never read."""
        self._used -= count
        self._positions[0] -= count
        self._lengths[0] -= count

    def drop(self, row: int) -> None:
        """See ``adalink.runtime.engine.DecodeState``; copies the last row's cache."""
        self._alive -= 1
        last = self._alive
        if row != last:
            length = self._lengths[row] = self._lengths[last]
            self._positions[row] = self._positions[last]
            self._cache[:, row, :, :length] = self._cache[:, last, :, :length]

    def close(self) -> None:
        """See ``adalink.runtime.engine.DecodeState``; memory is freed with the object."""

    def _make_room(self, count: int) -> None:
        """Double the cache where ``count`` more tokens of a row do not fit; calls are bound anew."""
        capacity, self._used = self._cache.shape[3], self._used + count
        if self._used <= capacity:
            return
        shape = (*self._cache.shape[:3], max(self._used, 2 * capacity), self._cache.shape[4])
        larger = _empty(shape, self._cache.dtype)
        larger[:, :, :, :capacity] = self._cache
        self._cache, self._step = larger, None
        self._verifications.clear()

    def _bind(
        self, rows: slice, inputs_embeds: Array, positions: Array, logits_indices: Array, logits: Array
    ) -> _Bound:
        """Bind a call to the buffers of ``rows``; it writes the logits at ``logits_indices`` of their tokens."""
        binding, value = self._session.call(lambda session: session.io_binding()), self._session.value
        buffers = {
            "inputs_embeds": inputs_embeds,
            "sequence_lengths": self._lengths[rows],
            "logits_at": logits_indices,
            "position_ids": positions,
        }
        for name in self._signature.inputs:
            binding.bind_ortvalue_input(name, value(buffers[name]))
        binding.bind_ortvalue_output(self._signature.output, value(logits))
        for past, present, layer in zip(self._signature.past, self._signature.present, self._cache, strict=True):
            shared = value(layer[rows])
            binding.bind_ortvalue_input(past, shared)
            binding.bind_ortvalue_output(present, shared)
        return _Bound(binding, inputs_embeds, positions, logits_indices, logits)

    def _run(self, bound: _Bound) -> None:
        self._session.call(lambda session: session.run_with_iobinding(bound.binding))


@dataclass(frozen=True, eq=False)
class _Bound:
    """A bound call. It keeps its buffers alive, which a binding of ONNX Runtime 1.23 does not."""

    binding: Any
    embeds: Array
    positions: Array
    logits_indices: Array
    logits: Array


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised KV cache; raises ``RequestError`` if there is no memory for it."""
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:  # numpy says ValueError of more bytes than an address can count
        size_gb = math.prod(shape) * dtype.itemsize / 1e9
        raise RequestError(
            f"no memory for a KV cache of {shape[1]} rows of {shape[3]} tokens ({size_gb:.1f} GB): send fewer rows, "
            "shorter prompts, or ask for fewer new tokens"
        ) from error


def _at_left(feeds: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """Left-aligned embeddings and position ids, and row lengths."""
    mask = feeds["attention_mask"]
    embeds, lengths = move_left(feeds["inputs_embeds"], mask)
    if "position_ids" in feeds:
        return embeds, move_left(feeds["position_ids"], mask)[0], lengths
    return embeds, np.minimum(np.arange(embeds.shape[1]), lengths[:, None] - 1), lengths
