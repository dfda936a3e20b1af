"""Static cache: engines on graphs that update their KV cache in place (docs/decisions/0005-decode-loop.md).

A decode state allocates its buffers at the start and binds them to the session once: the token embedding, the logits,
and the cache, whose input and output share an address. A step writes a few numbers and calls the session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.engine import (
    DecodeState,
    Engine,
    InputEmbedder,
    KvPrefixEngine,
    SlotEngine,
    SlotState,
    SpeculativeDecodeState,
)
from adalink.runtime.generation.admission import FIRST_TOKENS, PASS_TOKENS
from adalink.runtime.generation.padding import move_left, positions_after
from adalink.runtime.implements import implements
from adalink.runtime.ort.session import GuardedSession, Signature
from adalink.runtime.ort.static_buffers import BoundCall, empty_cache, longer


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
            **dict.fromkeys(signature.past, np.zeros((batch, heads, 0, head_dim), signature.cache_dtype)),
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
        embeds, positions, lengths = _at_left(feeds)
        # Larger when that many tokens have come: few rows use their whole limit, which may be any number.
        state = self.open_slots(len(embeds), embeds.shape[1] + min(max_new_tokens, FIRST_TOKENS))
        state.prefill(embeds, positions, lengths)
        return state

    @implements(KvPrefixEngine)
    def run_after(self, kv_prefixes: Sequence[Array | None], feeds: Mapping[str, Array]) -> Array:
        mask, signature = feeds["attention_mask"], self._signature
        result = np.zeros((*mask.shape, signature.vocab_size), signature.dtype)
        if plain := [row for row, states in enumerate(kv_prefixes) if states is None]:
            result[plain] = self.run({name: value[plain] for name, value in feeds.items()})
        for row, states in enumerate(kv_prefixes):
            if states is not None:
                embeds, _, lengths = _at_left(_one_row(feeds, row))
                state = self.open_slots(1, states.shape[2] + int(lengths[0]))
                state.begin(states)
                result[row, mask[row] != 0] = state.verify(embeds)
        return result

    @implements(KvPrefixEngine)
    def start_after(
        self, kv_prefixes: Sequence[Array | None], feeds: Mapping[str, Array], max_new_tokens: int
    ) -> StaticCacheDecodeState:
        lengths = feeds["attention_mask"].sum(axis=1)
        longest = max(
            int(length) + (0 if states is None else states.shape[2])
            for length, states in zip(lengths, kv_prefixes, strict=True)
        )
        state = self.open_slots(len(lengths), longest + min(max_new_tokens, FIRST_TOKENS))
        for row, states in enumerate(kv_prefixes):
            state.begin(states)
            state.extend(_one_row(feeds, row), 0, int(lengths[row]))
        return state

    @implements(KvPrefixEngine)
    def read_states(self, feeds: Mapping[str, Array]) -> Array:
        length = int(feeds["attention_mask"].sum())
        state = self.open_slots(1, length)
        state.begin(None)
        for start in range(0, length, PASS_TOKENS):
            state.extend(feeds, start, min(start + PASS_TOKENS, length))
        return state.states(0, length)

    @implements(SlotEngine)
    def open_slots(self, slots: int, capacity: int) -> StaticCacheDecodeState:
        return StaticCacheDecodeState(self._session, self._signature, slots, capacity)

    @implements(Engine)
    def close(self) -> None:
        self._session.close()


class StaticCacheDecodeState:
    """See ``adalink.runtime.engine.SlotState``. Rows come first in its buffers, free slots last."""

    def __init__(self, session: GuardedSession, signature: Signature, slots: int, capacity: int) -> None:
        """Allocate all buffers, without a row.

        Args:
            session: the graph's session.
            signature: the graph's signature.
            slots: rows that fit at first.
            capacity: tokens of a row, prompt and generated tokens together, that fit the cache at first.
        """
        heads, head_dim = signature.cache_shape
        self._session = session
        self._signature = signature
        self._alive = 0
        self._lengths = np.zeros(slots, np.int32)
        # Positions beyond a row's length are never read and stay uninitialised.
        self._cache = empty_cache((len(signature.past), slots, heads, capacity, head_dim), signature.cache_dtype)
        self._logits = np.empty((slots, signature.vocab_size), signature.dtype)
        self._logits_indices = np.arange(slots)
        # Position ids of each row's last token; the shape of one is known with the first row.
        self._positions = np.zeros((slots, 1), np.int64)
        # Bound calls: a decode step for the current number of rows, and a verification for each number of tokens.
        self._step: BoundCall | None = None
        self._verifications: dict[int, BoundCall] = {}

    def prefill(self, inputs_embeds: Array, positions: Array, lengths: Array) -> None:
        """Prefill: run prompts of shape ``(batch, longest, d)``, left-aligned, in a state without rows."""
        batch, longest = inputs_embeds.shape[:2]
        self._append(lengths, positions_after(positions) - 1)
        last = self._logits_indices[:batch] * longest + lengths - 1
        self._run(self._bind(slice(batch), inputs_embeds, positions, last, self._logits[:batch]))

    @implements(SlotState)
    def begin(self, states: Array | None) -> None:
        self._append(np.zeros(1, np.int32), self._positions[:1])
        if states is not None:
            row, length = self._alive - 1, states.shape[2]
            self._make_room(length)
            self._cache[:, row, :, :length] = states
            self._lengths[row], self._positions[row] = length, length - 1

    @implements(SlotState)
    def extend(self, feeds: Mapping[str, Array], start: int, stop: int) -> None:
        embeds, positions, _ = _at_left(feeds)
        row = self._alive - 1
        before = int(self._lengths[row]) - start  # positions of a KV prefix
        self._make_room(stop - start)
        if positions.ndim != self._positions.ndim:
            self._positions = np.zeros((len(self._lengths), 1, *positions.shape[2:]), np.int64)
        self._lengths[row] = before + stop
        self._positions[row] = before + positions_after(positions[:, :stop])[0] - 1
        piece, numbers = (np.ascontiguousarray(array[:, start:stop]) for array in (embeds, before + positions))
        rows = slice(row, row + 1)
        self._run(self._bind(rows, piece, numbers, np.array([stop - start - 1]), self._logits[rows]))

    @implements(SlotState)
    def adopt(self, state: StaticCacheDecodeState) -> None:
        first, count = self._alive, state._alive
        self._append(state._lengths[:count], state._positions[:count])
        self._make_room(0)
        rows, longest = slice(first, first + count), state._lengths[:count].max()
        self._cache[:, rows, :, :longest] = state._cache[:, :count, :, :longest]
        self._logits[rows] = state._logits[:count]

    @implements(SlotState)
    def states(self, row: int, length: int, start: int = 0) -> Array:
        return self._cache[:, row, :, start:length].copy()

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

    def _append(self, lengths: Array, positions: Array) -> None:
        """Append rows with these lengths and position ids of their last tokens; slots are doubled where they end."""
        first, alive = self._alive, self._alive + len(lengths)
        slots = len(self._lengths)
        if positions.ndim != self._positions.ndim:  # the first rows
            self._positions = np.zeros((slots, 1, *positions.shape[2:]), np.int64)
        if alive > slots:
            self._grow(max(alive, 2 * slots), self._cache.shape[3])
        self._lengths[first:alive], self._positions[first:alive] = lengths, positions
        self._alive = alive

    def _make_room(self, count: int) -> None:
        """Double the cache where ``count`` more tokens of a row do not fit; calls are bound anew."""
        capacity = self._cache.shape[3]
        needed = int(self._lengths[: self._alive].max()) + count
        if needed > capacity:
            self._grow(len(self._lengths), max(needed, 2 * capacity))

    def _grow(self, slots: int, capacity: int) -> None:
        """Move all rows into larger buffers."""
        alive, used = self._alive, min(capacity, self._cache.shape[3])
        layers, _, heads, _, head_dim = self._cache.shape
        larger = empty_cache((layers, slots, heads, capacity, head_dim), self._cache.dtype)
        larger[:, :alive, :, :used] = self._cache[:, :alive, :, :used]
        self._cache = larger
        self._lengths, self._positions = longer(self._lengths, slots), longer(self._positions, slots)
        self._logits, self._logits_indices = longer(self._logits, slots), np.arange(slots)
        self._step = None
        self._verifications.clear()

    def _bind(
        self, rows: slice, inputs_embeds: Array, positions: Array, logits_indices: Array, logits: Array
    ) -> BoundCall:
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
        return BoundCall(binding, inputs_embeds, positions, logits_indices, logits)

    def _run(self, bound: BoundCall) -> None:
        self._session.call(lambda session: session.run_with_iobinding(bound.binding))


def _one_row(feeds: Mapping[str, Array], row: int) -> dict[str, Array]:
    return {name: value[row : row + 1] for name, value in feeds.items()}


def _at_left(feeds: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """Left-aligned embeddings and position ids, and row lengths."""
    mask = feeds["attention_mask"]
    embeds, lengths = move_left(feeds["inputs_embeds"], mask)
    if "position_ids" in feeds:
        return embeds, move_left(feeds["position_ids"], mask)[0], lengths
    return embeds, np.minimum(np.arange(embeds.shape[1]), lengths[:, None] - 1), lengths
