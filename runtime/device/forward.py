"""Forward pass on a device: inputs written on the host, work enqueued on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.batch_inputs import BatchInputs
from adalink.runtime.device.adapter_weights import AdapterWeightPool, SlotReservation
from adalink.runtime.device.kv_cache import DeviceCache, DynamicDeviceCache, StaticDeviceCache
from adalink.runtime.device.protocols import DeviceArena, Executor
from adalink.runtime.device.workspace import DECODE, ENGINE, PREFILL, EmbedderWorkspace, EngineContext, Executors
from adalink.runtime.errors import GraphError
from adalink.runtime.storage.manifest import Base

_MOST_STEPS = 64


@dataclass(frozen=True, eq=False)
class ForwardBatch:
    """Inputs of one forward pass.

    Attributes:
        inputs: ids or embeddings, shape ``(batch, seq)``.
        reservation: slots of the rows' tasks.
        mask: attention mask, int64 with shape ``(batch, total)``; cached positions come first.
        positions: position ids, int64 with shape ``(batch, seq)``.
        logits_indices: positions whose logits are returned, as indices in ``batch * seq``.
        token_types: token types of an encoder's rows, int64 with shape ``(batch, seq)``; ``None`` if all are 0.
    """

    inputs: BatchInputs
    reservation: SlotReservation
    mask: Array
    positions: Array
    logits_indices: Array
    token_types: Array | None = None


@dataclass(eq=False)
class Step:
    """A decode step of one shape: its executors, and its recording if there is one."""

    executors: Executors
    pools: tuple[AdapterWeightPool, ...]
    replay: Callable[[], None] | None


class EngineWorkspace:
    """Buffers and executors of one batch at a time. For one thread at a time.

    Attributes:
        queue: the queue of its work.
        cache: the KV cache; ``None`` for an encoder.
    """

    def __init__(self, context: EngineContext) -> None:
        self._context = context
        self._arena = DeviceArena(context.device)
        self.queue = self._arena.queue
        self._prefill = Executors(context.plans, self._arena, PREFILL)
        self._growing_step = Executors(context.plans, self._arena, DECODE)
        self._steps: dict[tuple[object, ...], Step] = {}
        try:
            self._open(self._arena)
        except BaseException:
            self.close()
            raise

    def _open(self, arena: DeviceArena) -> None:
        base, profile = self._context.base, self._context.plans.profile
        self._embedder = EmbedderWorkspace(self._context, arena)
        engine = self._prefill[ENGINE]
        check_signature(engine, base)
        self._takes = frozenset(engine.inputs)
        batch, seq = profile.batch.max, profile.seq.max
        self._mask = arena.pinned_buffer(batch * profile.capacity, "int64")
        self._positions = arena.pinned_buffer(batch * seq, "int64")
        self._logits_indices = arena.pinned_buffer(profile.logits_capacity, "int64")
        self._write_indices = arena.pinned_buffer(batch, "int64")
        self._token_types = arena.pinned_buffer(batch * seq if "token_type_ids" in self._takes else 1, "int64")
        self.cache: DeviceCache | None = None
        self._output_name, self._width, rows = "last_hidden_state", base.hidden_size, batch * seq
        if base.cache is not None:
            self._output_name, self._width, rows = "logits", base.vocab_size, profile.logits_capacity
            kind = StaticDeviceCache if self.records else DynamicDeviceCache
            self.cache = kind(arena, base.cache, base.embedding_dtype, batch, profile.capacity)
        self._output = arena.pinned_buffer(rows * self._width, base.embedding_dtype)

    @property
    def records(self) -> bool:
        """Whether decode steps have fixed shapes and can be recorded."""
        return "write_indices" in self._takes

    @property
    def gathers_logits(self) -> bool:
        """Whether the engine returns logits only at the requested positions."""
        return "logits_at" in self._takes

    def prompt(self, forward_batch: ForwardBatch) -> Array:
        """Prefill pass: run prompt positions after those in the cache.

        Returns:
            A view of pinned memory: logits at ``logits_indices``, shape ``(indices, vocab)``; for an encoder, hidden
            states at every position, shape ``(batch * seq, d)``.
        """
        self._write(forward_batch)
        self._enqueue(self._prefill, forward_batch)
        self.queue.wait()
        return self._received(forward_batch)

    def decode(self, forward_batch: ForwardBatch) -> Array:
        """Decode step: run one token of each row, from a recording if there is one; returns as ``prompt`` does."""
        self._write(forward_batch)
        if not self.records:
            self._enqueue(self._growing_step, forward_batch)
        else:
            self._replay(forward_batch)
        self.queue.wait()
        return self._received(forward_batch)

    def close(self) -> None:
        """Give everything back."""
        for step in self._steps.values():
            step.executors.close()
        self._steps.clear()
        for executors in (self._prefill, self._growing_step):
            executors.close()
        self._arena.close()

    def _replay(self, forward_batch: ForwardBatch) -> None:
        """Enqueue a decode step from its recording; the first step of a shape is run directly and recorded.

        A recording holds addresses and shapes. Each therefore has its own executors, which are never bound again.
        """
        assert self.cache is not None
        adapter_passes = self._embedder.adapter_passes(forward_batch.inputs, forward_batch.reservation)
        pass_keys = tuple((adapter_pass.activation, adapter_pass.pool) for adapter_pass in adapter_passes)
        key = (
            forward_batch.mask.shape,
            forward_batch.inputs.ids is None,
            forward_batch.inputs.modality is None,
            pass_keys,
        )
        step = self._steps.get(key)
        if step is None:
            self._forget_steps()
            executors = Executors(self._context.plans, self._arena, DECODE)
            self._enqueue(executors, forward_batch)
            # Recording needs an engine that has run with these shapes.
            self.queue.wait()
            executors.is_bound = True
            length = self.cache.length
            replay = self.queue.record(lambda: self._enqueue(executors, forward_batch))
            self.cache.length = length
            self._steps[key] = Step(executors, tuple(pool for _, pool in pass_keys), replay)
        elif step.replay is not None:
            step.replay()
            self.cache.advance(1)
        else:
            self._enqueue(step.executors, forward_batch)

    def _forget_steps(self) -> None:
        """Drop the oldest recordings beyond a limit, and those that read a replaced pool."""
        stale = [
            key for key, step in self._steps.items() if not all(map(self._context.adapter_pools.is_current, step.pools))
        ]
        for key in [*stale, *list(self._steps)[: max(0, len(self._steps) + 1 - _MOST_STEPS)]]:
            if key in self._steps:
                self._steps.pop(key).executors.close()

    def _write(self, forward_batch: ForwardBatch) -> None:
        """Write the inputs into pinned memory; the queue must be idle."""
        self._embedder.write(forward_batch.inputs, forward_batch.reservation)
        self._mask.host(*forward_batch.mask.shape)[:] = forward_batch.mask
        self._positions.host(*forward_batch.positions.shape)[:] = forward_batch.positions
        self._logits_indices.host(len(forward_batch.logits_indices))[:] = forward_batch.logits_indices
        if "token_type_ids" in self._takes:
            types = forward_batch.token_types
            self._token_types.host(*forward_batch.positions.shape)[:] = 0 if types is None else types
        if self.cache is not None:
            self._write_indices.host(len(forward_batch.mask))[:] = self.cache.length

    def _enqueue(self, executors: Executors, forward_batch: ForwardBatch) -> None:
        """Enqueue copies, embedders and engine; reads only shapes and weight addresses of ``forward_batch``."""
        batch, seq = forward_batch.inputs.shape
        engine, shape = executors[ENGINE], self._output_shape(forward_batch)
        embeds = self._embedder.enqueue(executors, forward_batch.inputs, forward_batch.reservation)
        buffers = {
            "attention_mask": (self._mask, forward_batch.mask.shape),
            "position_ids": (self._positions, (batch, seq)),
            "logits_at": (self._logits_indices, forward_batch.logits_indices.shape),
            "write_indices": (self._write_indices, (batch,)),
            "token_type_ids": (self._token_types, (batch, seq)),
        }
        engine_buffers = {name: pair for name, pair in buffers.items() if name in self._takes}
        for pinned_buffer, size in engine_buffers.values():
            pinned_buffer.upload(self.queue, *size)
        if not executors.is_bound:
            engine.bind("inputs_embeds", embeds, (batch, seq, self._context.base.hidden_size))
            for name, (pinned_buffer, size) in engine_buffers.items():
                engine.bind(name, pinned_buffer.address, size)
            if self.cache is not None:
                self.cache.bind(engine, batch, seq)
            engine.bind(self._output_name, self._output.address, shape)
        engine.enqueue()
        self._output.download(self.queue, *shape)
        if self.cache is not None:
            self.cache.advance(seq)

    def _output_shape(self, forward_batch: ForwardBatch) -> tuple[int, ...]:
        batch, seq = forward_batch.inputs.shape
        if self.gathers_logits:
            return len(forward_batch.logits_indices), self._width
        return batch, seq, self._width

    def _received(self, forward_batch: ForwardBatch) -> Array:
        output = self._output.host(*self._output_shape(forward_batch))
        if self.gathers_logits:
            return output
        flat = output.reshape(-1, self._width)
        is_everything = self.cache is None or len(forward_batch.logits_indices) == len(flat)
        return flat if is_everything else flat[forward_batch.logits_indices]


def check_signature(engine: Executor, base: Base) -> None:
    """Check that inputs and outputs are those of a base graph; raises ``GraphError``."""
    inputs = {"inputs_embeds", "attention_mask"} | ({"token_type_ids"} if base.takes_token_types else set())
    outputs = {"last_hidden_state" if base.cache is None else "logits"}
    if base.cache is not None:
        for past, present in base.cache.names():
            inputs.add(past)
            outputs.add(present)
    optional = set() if base.cache is None else {"position_ids", "logits_at", "write_indices"}
    missing = sorted((inputs - engine.inputs.keys()) | (outputs - engine.outputs.keys()))
    unknown = sorted((engine.inputs.keys() - inputs - optional) | (engine.outputs.keys() - outputs))
    if missing or unknown:
        what = f"{missing[0]!r} is missing" if missing else f"{unknown[0]!r} is not of the contract"
        raise GraphError(f"the engine of {base.name}: {what}; it was built from another graph: build the engine again")
    received = engine.inputs["inputs_embeds"]
    if received.dtype != base.embedding_dtype or received.shape[-1] != base.hidden_size:
        raise GraphError(
            f"the engine of {base.name}: inputs_embeds is {received.dtype} of width {received.shape[-1]}, the base has "
            f"{base.embedding_dtype} of width {base.hidden_size}: build the engine again"
        )


def last_columns(mask: Array) -> Array:
    """Column of the last token of each row."""
    last: Array = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    return np.asarray(last)
