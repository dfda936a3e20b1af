"""Workspaces: executors and embedder buffers of one call at a time, allocated once at maximal size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from adalink.runtime.arrays import Array
from adalink.runtime.batch_inputs import BatchInputs
from adalink.runtime.device.adapter_weights import AdapterPass, AdapterWeightPools, SlotReservation
from adalink.runtime.device.protocols import Device, DeviceArena, Executor, PinnedBuffer
from adalink.runtime.profile import Profile
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.safetensors import as_stored

ENGINE, VISION = "engine", "vision"
PREFILL, DECODE = 0, 1


class Plans(Protocol):
    """The compiled graphs of one engine; safe for calls from several threads."""

    @property
    def profile(self) -> Profile:
        """Shapes that the engine takes."""
        ...

    @property
    def largest_rank(self) -> int:
        """Largest rank that the embedders take."""
        ...

    @property
    def largest_slots(self) -> int:
        """Most weight slots that the embedders take."""
        ...

    def executor(self, name: str, profile: int, arena: DeviceArena) -> Executor:
        """A new executor of ``"engine"``, ``"vision"`` or an embedder such as ``"gelu.ids"``, on the arena's queue.

        Raises:
            BackendError: there is no such graph, or the device's memory is full.
        """
        ...

    def close(self) -> None:
        """Free all engines."""
        ...


class Executors:
    """Executors of the graphs under one profile, opened at first use.

    Attributes:
        is_bound: whether the bindings are final, as a recorded step requires.
    """

    def __init__(self, plans: Plans, arena: DeviceArena, profile: int) -> None:
        self._plans = plans
        self._arena = arena
        self._profile = profile
        self._open: dict[str, Executor] = {}
        self.is_bound = False

    def __getitem__(self, name: str) -> Executor:
        if name not in self._open:
            self._open[name] = self._plans.executor(name, self._profile if name == ENGINE else 0, self._arena)
        return self._open[name]

    def close(self) -> None:
        """Close all executors."""
        for executor in self._open.values():
            executor.close()
        self._open.clear()


@dataclass(frozen=True)
class EngineContext:
    """Shared state of an engine's workspaces.

    Attributes:
        device: the device.
        plans: the compiled graphs.
        adapter_pools: adapter weights.
        table: device address of the embedding table.
        base: the contract.
    """

    device: Device
    plans: Plans
    adapter_pools: AdapterWeightPools
    table: int
    base: Base


class EmbedderWorkspace:
    """Buffers for computing adapted embeddings from ids and tasks. For one thread at a time."""

    def __init__(self, context: EngineContext, arena: DeviceArena) -> None:
        profile, width = context.plans.profile, context.base.hidden_size
        positions = profile.batch.max * profile.seq.max
        self._context = context
        self._arena = arena
        self._ids = arena.pinned_buffer(positions, "int64")
        self._embeds = [arena.pinned_buffer(positions * width, context.base.embedding_dtype) for _ in range(2)]
        # For each adapter pass: the task index of the rows, and the positions of its modality.
        self._indices: list[tuple[PinnedBuffer, PinnedBuffer]] = []

    def write(self, inputs: BatchInputs, reservation: SlotReservation) -> None:
        """Write the inputs of a pass into pinned memory."""
        batch, seq = inputs.shape
        if inputs.ids is not None:
            self._ids.host(batch, seq)[:] = inputs.ids
        else:
            assert inputs.embeds is not None
            dtype = self._context.base.embedding_dtype
            self._embeds[0].host(batch, seq, self._context.base.hidden_size)[:] = as_stored(inputs.embeds, dtype)
        for adapter_pass, (index, chosen) in self._passes_with_buffers(inputs, reservation):
            index.host(batch)[:] = adapter_pass.task_index
            chosen.host(batch, seq)[:] = True if inputs.modality is None else inputs.modality == adapter_pass.modality

    def adapter_passes(self, inputs: BatchInputs, reservation: SlotReservation) -> Sequence[AdapterPass]:
        """Adapter passes in order; for token ids, the first one also looks up embeddings."""
        adapter_passes = [
            adapter_pass
            for adapter_pass in reservation.adapter_passes
            if inputs.modality is not None or adapter_pass.modality == 0
        ]
        if inputs.ids is not None and (not adapter_passes or inputs.modality is not None):
            return [self._context.adapter_pools.base_pass(inputs.shape[0]), *adapter_passes]
        return adapter_passes

    def enqueue(self, executors: Executors, inputs: BatchInputs, reservation: SlotReservation) -> int:
        """Enqueue copies and embedders; returns the address of the adapted embeddings."""
        batch, seq = inputs.shape
        shape, queue = (batch, seq, self._context.base.hidden_size), self._arena.queue
        current, other = self._embeds
        if inputs.ids is None:
            current.upload(queue, *shape)
        else:
            self._ids.upload(queue, batch, seq)
        is_lookup = inputs.ids is not None
        for adapter_pass, (index, chosen) in self._passes_with_buffers(inputs, reservation):
            embedder = executors[f"{adapter_pass.activation}.{'ids' if is_lookup else 'embeds'}"]
            index.upload(queue, batch)
            if not is_lookup:
                chosen.upload(queue, batch, seq)
            if not executors.is_bound:
                source = self._ids if is_lookup else current
                _bind_embedder(
                    embedder, adapter_pass, source.address, self._context.table, (batch, seq, self._context.base)
                )
                embedder.bind("task_index", index.address, (batch,))
                if not is_lookup:
                    embedder.bind("is_adapted", chosen.address, (batch, seq))
                embedder.bind("adapted_embeds", other.address, shape)
            embedder.enqueue()
            current, other, is_lookup = other, current, False
        return current.address

    def read(self, address: int, *shape: int) -> Array:
        """Download the embeddings at an address from ``enqueue``; a view of pinned memory."""
        pinned_buffer = next(pinned_buffer for pinned_buffer in self._embeds if pinned_buffer.address == address)
        pinned_buffer.download(self._arena.queue, *shape)
        self._arena.queue.wait()
        return pinned_buffer.host(*shape)

    def _passes_with_buffers(
        self, inputs: BatchInputs, reservation: SlotReservation
    ) -> Iterable[tuple[AdapterPass, tuple[PinnedBuffer, PinnedBuffer]]]:
        """Adapter passes with their buffers; buffers are kept for later calls."""
        profile, adapter_passes = self._context.plans.profile, self.adapter_passes(inputs, reservation)
        while len(self._indices) < len(adapter_passes):
            batch = profile.batch.max
            pair = self._arena.pinned_buffer(batch, "int64"), self._arena.pinned_buffer(batch * profile.seq.max, "bool")
            self._indices.append(pair)
        return zip(adapter_passes, self._indices, strict=False)


def _bind_embedder(
    embedder: Executor, adapter_pass: AdapterPass, source: int, table: int, size: tuple[int, int, Base]
) -> None:
    """Bind an embedder's inputs: ids and table, or embeddings; and the pool's weights."""
    batch, seq, base = size
    if "input_ids" in embedder.inputs:
        embedder.bind("input_ids", source, (batch, seq))
        embedder.bind("table", table, (base.vocab_size, base.hidden_size))
    else:
        embedder.bind("inputs_embeds", source, (batch, seq, base.hidden_size))
    for name, address in adapter_pass.pool.addresses.items():
        embedder.bind(name, address, adapter_pass.pool.shapes[name])
