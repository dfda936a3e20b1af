"""Device engine: an engine and input embedder whose memory stays on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.batch_inputs import BatchInputs
from adalink.runtime.device.adapter_weights import AdapterWeightPools
from adalink.runtime.device.decode_state import DeviceDecodeState, piece_length, prompt_pieces
from adalink.runtime.device.forward import EngineWorkspace, ForwardBatch
from adalink.runtime.device.protocols import NUMPY, Device, DeviceArena, as_numbers
from adalink.runtime.device.workspace import PREFILL, EmbedderWorkspace, EngineContext, Executors, Plans
from adalink.runtime.device.workspace_pool import WorkspacePool
from adalink.runtime.engine import Engine, EngineInput, InputEmbedder
from adalink.runtime.generation.padding import positions_of
from adalink.runtime.implements import implements
from adalink.runtime.profile import Profile, pieces
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.runtime.tasks.adapter_mapping import NO_ADAPTER, AdapterMapping
from adalink.runtime.tasks.host_embedder import HostEmbedder


class DeviceEmbedder:
    """See ``adalink.runtime.engine.InputEmbedder``; results are batch inputs, which the engine embeds itself."""

    def __init__(self, context: EngineContext, table: EmbeddingTable) -> None:
        self._context = context
        self._table = table
        self._workspaces: WorkspacePool[_ReadWorkspace] = WorkspacePool(lambda: _ReadWorkspace(context))

    def lookup(self, ids: Array, tasks: AdapterMapping, modality: Array | None = None) -> BatchInputs:
        """See ``adalink.runtime.engine.InputEmbedder``; token embedding deltas are added in main memory."""
        if tasks.needs_ids:
            return BatchInputs(None, tasks.embed(self._table, ids, modality), modality, tasks)
        return BatchInputs(ids, None, modality, tasks)

    @implements(InputEmbedder)
    def apply(self, embeds: Array, tasks: AdapterMapping, modality: Array | None = None) -> BatchInputs:
        return BatchInputs(None, embeds, modality, tasks)

    def for_decoding(self, tasks: AdapterMapping) -> AdapterMapping:
        """See ``adalink.runtime.engine.InputEmbedder``; no stacking, since a row selects its task by slot."""
        return tasks.generated()

    def read(self, engine_input: BatchInputs) -> Array:
        """See ``adalink.runtime.engine.InputEmbedder``; bfloat16 is returned as its bits, uint16."""
        profile, base = self._context.plans.profile, self._context.base
        batch, seq = engine_input.shape
        result = np.zeros((batch, seq, base.hidden_size), NUMPY[base.embedding_dtype])
        with self._workspaces.lend() as workspace:
            for first in range(0, batch, profile.batch.max):
                rows = engine_input.rows(first, min(first + profile.batch.max, batch))
                for start, stop in pieces(seq, profile.seq.max):
                    result[first : first + rows.shape[0], start:stop] = workspace.read(rows.columns(start, stop))
        return result

    def close(self, at_end: Callable[[], None]) -> None:
        """Free its memory, then call ``at_end``."""
        self._workspaces.close(at_end)


class PreEmbedded:
    """See ``adalink.runtime.engine.InputEmbedder``: adapters are applied in main memory, before the device."""

    def __init__(self, table: EmbeddingTable) -> None:
        self._host = HostEmbedder(table)

    @implements(InputEmbedder)
    def lookup(self, ids: Array, tasks: AdapterMapping, modality: Array | None = None) -> BatchInputs:
        return BatchInputs(None, self._host.lookup(ids, tasks, modality), None, NO_ADAPTER)

    @implements(InputEmbedder)
    def apply(self, embeds: Array, tasks: AdapterMapping, modality: Array | None = None) -> BatchInputs:
        return BatchInputs(None, self._host.apply(embeds, tasks, modality), None, NO_ADAPTER)

    @implements(InputEmbedder)
    def for_decoding(self, tasks: AdapterMapping) -> AdapterMapping:
        return self._host.for_decoding(tasks)

    @implements(InputEmbedder)
    def read(self, engine_input: BatchInputs) -> Array:
        assert engine_input.embeds is not None
        return engine_input.embeds


class _ReadWorkspace:
    def __init__(self, context: EngineContext) -> None:
        self._context = context
        self._arena = DeviceArena(context.device)
        self._executors = Executors(context.plans, self._arena, PREFILL)
        try:
            self._embedder = EmbedderWorkspace(context, self._arena)
        except BaseException:
            self.close()
            raise

    def read(self, inputs: BatchInputs) -> Array:
        batch, seq = inputs.shape
        reservation = self._context.adapter_pools.reserve(inputs.tasks, batch)
        try:
            self._embedder.write(inputs, reservation)
            address = self._embedder.enqueue(self._executors, inputs, reservation)
            return self._embedder.read(address, batch, seq, self._context.base.hidden_size)
        finally:
            reservation.release()

    def close(self) -> None:
        self._executors.close()
        self._arena.close()


class DeviceEngine:
    """See ``adalink.runtime.engine.Engine``."""

    def __init__(
        self,
        device: Device,
        plans: Plans,
        base: Base,
        table: EmbeddingTable | None = None,
        embedder: InputEmbedder | None = None,
    ) -> None:
        """Copy the embedding table to the device, unless ``embedder`` applies adapters on the host."""
        self._device = device
        self.profile: Profile | None = plans.profile
        self.padding_side = "right" if base.kind == "encoder" else "left"
        self._plans = plans
        self._base = base
        adapter_pools = AdapterWeightPools(device, base.hidden_size, plans.largest_rank, plans.largest_slots)
        self._context = EngineContext(
            device, plans, adapter_pools, 0 if table is None else upload_table(device, table), base
        )
        if embedder is None:
            assert table is not None, "a DeviceEmbedder looks token ids up in the table"
            embedder = DeviceEmbedder(self._context, table)
        self.embedder: InputEmbedder = embedder
        self._workspaces: WorkspacePool[EngineWorkspace] = WorkspacePool(lambda: EngineWorkspace(self._context))
        # Opening a workspace now reports a faulty plan before the first request.
        self._workspaces.give(self._workspaces.take())

    @implements(Engine)
    def run(self, feeds: Mapping[str, EngineInput]) -> Array:
        inputs, mask, types = feeds["inputs_embeds"], feeds["attention_mask"], feeds.get("token_type_ids")
        batch, seq = mask.shape
        profile = self._plans.profile
        profile.check_length(seq)
        width = self._base.hidden_size if self._base.cache is None else self._base.vocab_size
        result: Array | None = None
        with self._workspaces.lend() as workspace:
            at_once = profile.batch.max
            if self._base.bidirectional_prompt:  # fewer rows, so that each fits one pass
                at_once = max(1, min(at_once, profile.logits_capacity // seq))
            for first in range(0, batch, at_once):
                last = min(first + at_once, batch)
                profile.check_batch(last - first)
                row_types = None if types is None else types[first:last]
                for columns, output in self._passes(workspace, inputs.rows(first, last), mask[first:last], row_types):
                    numbers = as_numbers(output, self._base.embedding_dtype)
                    if result is None:
                        result = np.zeros((batch, seq, width), numbers.dtype)
                    result[first:last, columns] = numbers.reshape(last - first, -1, width)
        assert result is not None
        return result

    @implements(Engine)
    def start(self, feeds: Mapping[str, EngineInput], max_new_tokens: int) -> DeviceDecodeState:
        inputs, mask = feeds["inputs_embeds"], feeds["attention_mask"]
        profile = self._plans.profile
        profile.check_batch(len(mask))
        profile.check_length(mask.shape[1] + max_new_tokens)
        workspace = self._workspaces.take()
        state = DeviceDecodeState(
            workspace, self._context.adapter_pools, self._base, profile, lambda: self._workspaces.give(workspace)
        )
        try:
            state.prefill(inputs, mask)
        except BaseException:
            state.close()
            raise
        return state

    def close(self) -> None:
        """See ``adalink.runtime.engine.Engine``; running calls free their memory when they end."""
        self._workspaces.close(self._close_embedder)

    def _close_embedder(self) -> None:
        if isinstance(self.embedder, DeviceEmbedder):
            self.embedder.close(self._close_context)
        else:
            self._close_context()

    def _close_context(self) -> None:
        self._context.adapter_pools.close()
        self._device.free(self._context.table)
        self._plans.close()

    def _passes(
        self, workspace: EngineWorkspace, inputs: BatchInputs, mask: Array, token_types: Array | None
    ) -> Iterator[tuple[slice, Array]]:
        """Run whole rows in one or more passes, an encoder's in one; yields the columns and output of each pass."""
        batch, seq = mask.shape
        positions = positions_of(mask)
        is_decoder = workspace.cache is not None
        if workspace.cache is not None:
            workspace.cache.length = 0
        reservation = self._context.adapter_pools.reserve(inputs.tasks, batch)
        try:
            most = piece_length(self._plans.profile, batch)
            for start, stop in prompt_pieces(seq, most, self._base) if is_decoder else [(0, seq)]:
                logits_indices = np.arange(batch * (stop - start) if is_decoder else 0)
                piece = inputs.columns(start, stop)
                yield (
                    slice(start, stop),
                    workspace.prompt(
                        ForwardBatch(
                            piece, reservation, mask[:, :stop], positions[:, start:stop], logits_indices, token_types
                        )
                    ),
                )
        finally:
            reservation.release()


def upload_table(device: Device, table: EmbeddingTable) -> int:
    """Copy the embedding table to the device through a window of pinned memory; returns its address."""
    count, width = table.shape
    row_bytes = width * table.dtype.itemsize
    window = device.pinned((min(max(1, (8 << 20) // row_bytes), count), width), table.dtype)
    address, queue = device.allocate(count * row_bytes), device.open_queue()
    try:
        for first in range(0, count, len(window)):
            block = table.block(first, first + len(window))
            window[: len(block)] = block
            queue.upload(address + first * row_bytes, window[: len(block)])
            queue.wait()
    finally:
        queue.close()
    return address
