"""Engines on graphs that write their cache in place (docs/decisions/0005-decode-loop.md).

Every buffer of a decoding is allocated when it starts and bound to the session once: the cache, which is input and
output at the same address, the embedding of a token, the logits. A step writes a few numbers and calls the session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.engine import InputEmbedder
from adalink.runtime.generation.padding import move_left, positions_after
from adalink.runtime.ort.session import GuardedSession, Signature


class StaticCacheEngine:
    """A base graph in one session. Rows lie at the left of its inputs, so that a cache has no gaps."""

    def __init__(self, session: GuardedSession, signature: Signature, embedder: InputEmbedder) -> None:
        self.embedder = embedder
        self.profile = None
        self.padding_side = "right"
        self._session = session
        self._signature = signature

    def run(self, feeds: Mapping[str, Array]) -> Array:
        """See ``adalink.runtime.engine.Engine``."""
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

    def start(self, feeds: Mapping[str, Array], max_new_tokens: int) -> StaticCacheDecodeState:
        """See ``adalink.runtime.engine.Engine``."""
        state, embeds, positions, _ = self._allocate(feeds, max_new_tokens)
        state.prefill(embeds, positions)
        return state

    def resume(
        self, feeds: Mapping[str, Array], max_new_tokens: int, known: Sequence[Array | None]
    ) -> StaticCacheDecodeState:
        """See ``adalink.runtime.engine.ResumableEngine``."""
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
        """A decoding with nothing read yet, the rows' embeddings and positions at the left, and their lengths."""
        embeds, positions, lengths = _at_left(feeds)
        capacity = embeds.shape[1] + max_new_tokens
        state = StaticCacheDecodeState(self._session, self._signature, lengths, positions_after(positions), capacity)
        return state, embeds, positions, lengths

    def close(self) -> None:
        """See ``adalink.runtime.engine.Engine``."""
        self._session.close()


class StaticCacheDecodeState:
    """See ``adalink.runtime.engine.DecodeState``. The first rows of its buffers are alive; dropped ones lie behind."""

    def __init__(
        self, session: GuardedSession, signature: Signature, lengths: Array, following: Array, capacity: int
    ) -> None:
        """Allocate everything.

        Args:
            session: the graph's session.
            signature: what the graph takes.
            lengths: tokens of each row's prompt, int32 with shape ``(batch,)``.
            following: position ids of the tokens that follow, int64 with shape ``(batch, 1)`` or ``(batch, 1, axes)``.
            capacity: most tokens that a row may have in the end.
        """
        batch = len(lengths)
        heads, head_dim = signature.cache_shape
        self._session = session
        self._signature = signature
        self._lengths = lengths
        # Places behind a row's length are never read, so they need no value.
        self._cache = np.empty((len(signature.past), batch, heads, capacity, head_dim), signature.dtype)
        self._logits = np.empty((batch, signature.vocab_size), signature.dtype)
        self._logits_indices = np.arange(batch)
        self._positions = following - 1  # a step counts on
        self._alive = batch
        # Calls with their buffers bound: a step for as many rows as there are, an extension by as many tokens.
        self._step: _Bound | None = None
        self._extensions: dict[int, _Bound] = {}

    def prefill(self, inputs_embeds: Array, positions: Array) -> None:
        """Run the prompts, shape ``(batch, longest, d)``, each row's tokens at its left."""
        batch, longest = inputs_embeds.shape[:2]
        last = self._logits_indices * longest + self._lengths - 1
        self._run(self._bind(slice(batch), inputs_embeds, positions, last, self._logits))

    def resume(self, row: int, inputs_embeds: Array, positions: Array, states: Array | None) -> None:
        """Run the prompt of one row, shape ``(1, length, d)``, after the tokens whose states are known.

        The operator takes several tokens after a cache for a single row only, so each row is a call.
        """
        known = 0
        if states is not None:
            known = states.shape[2]
            self._cache[:, row, :, :known] = states
        rest, rest_positions = (np.ascontiguousarray(array[:, known:]) for array in (inputs_embeds, positions))
        row_slice = slice(row, row + 1)
        self._run(self._bind(row_slice, rest, rest_positions, np.array([rest.shape[1] - 1]), self._logits[row_slice]))

    def states(self, row: int, length: int) -> Array:
        """See ``adalink.runtime.engine.ResumableDecoding``."""
        return self._cache[:, row, :, :length].copy()

    @property
    def logits(self) -> Array:
        """See ``adalink.runtime.engine.DecodeState``."""
        return self._logits[: self._alive]

    def step(self, inputs_embeds: Array) -> None:
        """See ``adalink.runtime.engine.DecodeState``."""
        alive = self._alive
        if self._step is None or len(self._step.embeds) != alive:
            rows, embeds = slice(alive), np.empty_like(inputs_embeds)
            self._step = self._bind(rows, embeds, self._positions[rows], self._logits_indices[rows], self._logits[rows])
        self._step.embeds[:] = inputs_embeds
        self._positions[:alive] += 1
        self._lengths[:alive] += 1
        self._run(self._step)

    def verify(self, inputs_embeds: Array) -> Array:
        """See ``adalink.runtime.engine.CheckingDecoding``."""
        count = inputs_embeds.shape[1]
        bound = self._extensions.get(count)
        if bound is None:
            logits = np.empty((count, self._signature.vocab_size), self._signature.dtype)
            positions = np.repeat(self._positions[:1], count, axis=1)
            bound = self._bind(slice(1), np.empty_like(inputs_embeds), positions, np.arange(count), logits)
            self._extensions[count] = bound
        bound.embeds[:] = inputs_embeds
        ahead = np.arange(1, count + 1).reshape(1, count, *[1] * (self._positions.ndim - 2))
        np.add(self._positions[:1], ahead, out=bound.positions)
        self._positions[0] += count
        self._lengths[0] += count
        self._run(bound)
        return bound.logits

    def rollback(self, count: int) -> None:
        """See ``adalink.runtime.engine.CheckingDecoding``: places behind a row's length are never read."""
        self._positions[0] -= count
        self._lengths[0] -= count

    def drop(self, row: int) -> None:
        """See ``adalink.runtime.engine.DecodeState``; copies what the last row has cached."""
        self._alive -= 1
        last = self._alive
        if row != last:
            length = self._lengths[row] = self._lengths[last]
            self._positions[row] = self._positions[last]
            self._cache[:, row, :, :length] = self._cache[:, last, :, :length]

    def close(self) -> None:
        """See ``adalink.runtime.engine.DecodeState``; its memory goes with it."""

    def _bind(
        self, rows: slice, inputs_embeds: Array, positions: Array, logits_indices: Array, logits: Array
    ) -> _Bound:
        """A call that reads and writes the buffers of some rows; the logits at ``logits_indices`` of their tokens."""
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
    """A call that has its buffers. It holds those that nobody else does: a binding of ONNX Runtime 1.23 does not."""

    binding: Any
    embeds: Array
    positions: Array
    logits_indices: Array
    logits: Array


def _at_left(feeds: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """Embeddings, position ids and lengths of rows, each row's tokens at its left."""
    mask = feeds["attention_mask"]
    embeds, lengths = move_left(feeds["inputs_embeds"], mask)
    if "position_ids" in feeds:
        return embeds, move_left(feeds["position_ids"], mask)[0], lengths
    return embeds, np.minimum(np.arange(embeds.shape[1]), lengths[:, None] - 1), lengths
