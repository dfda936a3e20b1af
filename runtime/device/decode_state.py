"""Decode state of an engine whose memory stays on the device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.batch_inputs import BatchInputs
from adalink.runtime.device.adapter_weights import AdapterWeightPools, SlotReservation
from adalink.runtime.device.forward import EngineWorkspace, ForwardBatch, last_columns
from adalink.runtime.device.protocols import as_numbers
from adalink.runtime.engine import DecodeState
from adalink.runtime.errors import RequestError
from adalink.runtime.generation.padding import positions_of
from adalink.runtime.implements import implements
from adalink.runtime.profile import Profile, pieces, rounded_total
from adalink.runtime.storage.manifest import Base
from adalink.runtime.tasks.adapter_mapping import AdapterMapping


class DeviceDecodeState:
    """See ``adalink.runtime.engine.DecodeState``; holds a workspace until it is closed."""

    def __init__(
        self,
        workspace: EngineWorkspace,
        adapter_pools: AdapterWeightPools,
        base: Base,
        profile: Profile,
        end: Callable[[], None],
    ) -> None:
        """``end`` is called once, on close."""
        self._workspace = workspace
        self._adapter_pools = adapter_pools
        self._base = base
        self._dtype = base.embedding_dtype
        self._profile = profile
        self._end = end
        self._tasks: AdapterMapping | None = None
        self._reservation = SlotReservation(adapter_pools, [])
        self._is_closed = False

    def prefill(self, inputs: BatchInputs, mask: Array) -> None:
        """Prefill in one or more passes; ``mask`` is 1 for tokens, shape ``(batch, seq)``."""
        batch, longest = mask.shape
        assert self._workspace.cache is not None
        self._workspace.cache.length = 0
        self._alive = batch
        self._mask = np.zeros((batch, self._profile.capacity), np.int64)
        self._mask[:, :longest] = mask
        self._positions = mask.sum(axis=1, keepdims=True)
        self._logits = np.zeros((batch, self._base.vocab_size), self._numbers)
        positions, last = positions_of(mask), last_columns(mask)
        reservation = self._reserve(inputs.tasks, batch)
        most = piece_length(self._profile, batch)
        if self._base.bidirectional_prompt and self._workspace.gathers_logits:
            most = self._profile.seq.max  # only the last position of a row needs logits
        for start, stop in prompt_pieces(longest, most, self._base):
            rows = np.flatnonzero((start <= last) & (last < stop))
            # A pass in which no row ends gathers one position's logits and ignores them.
            logits_indices = rows * (stop - start) + last[rows] - start if len(rows) else np.zeros(1, np.int64)
            piece = inputs.columns(start, stop)
            output = self._workspace.prompt(
                ForwardBatch(piece, reservation, mask[:, :stop], positions[:, start:stop], logits_indices)
            )
            if len(rows):
                self._logits[rows] = as_numbers(output, self._dtype)

    @property
    @implements(DecodeState)
    def logits(self) -> Array:
        return self._logits[: self._alive]

    @implements(DecodeState)
    def step(self, inputs_embeds: BatchInputs) -> None:
        alive, cache = self._alive, self._workspace.cache
        assert cache is not None
        total = cache.length + 1
        self._mask[:alive, total - 1] = 1
        if self._workspace.records:
            total = rounded_total(total, self._profile.capacity)
        reservation = self._reserve(inputs_embeds.tasks, alive)
        forward_batch = ForwardBatch(
            inputs_embeds, reservation, self._mask[:alive, :total], self._positions[:alive], np.arange(alive)
        )
        output = self._workspace.decode(forward_batch)
        self._logits = as_numbers(output, self._dtype) if self._dtype == "bfloat16" else output
        self._positions += 1

    def drop(self, row: int) -> None:
        """See ``adalink.runtime.engine.DecodeState``; copies the last row's cache on the device."""
        self._alive -= 1
        last = self._alive
        if row != last:
            assert self._workspace.cache is not None
            self._workspace.cache.move(self._workspace.queue, last, row)
            self._mask[row], self._positions[row] = self._mask[last], self._positions[last]

    def close(self) -> None:
        """See ``adalink.runtime.engine.DecodeState``; returns the workspace to the pool."""
        if not self._is_closed:
            self._is_closed = True
            self._reservation.release()
            self._end()

    @property
    def _numbers(self) -> type[np.floating]:
        return np.float16 if self._dtype == "float16" else np.float32

    def _reserve(self, tasks: AdapterMapping, batch: int) -> SlotReservation:
        """Slots of the rows' tasks; reserved again only when the batch or its tasks change."""
        if tasks is not self._tasks:
            before = self._reservation
            self._reservation = self._adapter_pools.reserve(tasks, batch)
            before.release()
            self._tasks = tasks
        return self._reservation


def prompt_pieces(length: int, most: int, base: Base) -> list[tuple[int, int]]:
    """Start and stop of the prefill passes, of at most ``most`` positions each; raises ``RequestError``."""
    passes = pieces(length, most)
    if base.bidirectional_prompt and len(passes) > 1:
        raise RequestError(
            f"the prompts are {length} positions long and the engine takes {most} of so many rows at a time, but a "
            f"prompt of {base.name} attends in both directions and must go in at once: shorten it, give fewer rows, or "
            "build the engine with a larger seq"
        )
    return passes


def piece_length(profile: Profile, batch: int) -> int:
    """Positions of a prefill pass, limited by the profile and by the logits buffer."""
    return max(1, min(profile.seq.max, profile.logits_capacity // batch))
