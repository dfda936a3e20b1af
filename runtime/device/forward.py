"""One pass of an engine: what is written for it on the host, and what is enqueued on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.device.bank import Choice, Stack
from adalink.runtime.device.inputs import Inputs
from adalink.runtime.device.kv_cache import DeviceCache, GrowingCache, InPlaceCache
from adalink.runtime.device.protocols import Executor, Lease
from adalink.runtime.device.workspace import DECODE, ENGINE, PREFILL, Common, Executors, FrontSpace
from adalink.runtime.errors import GraphError
from adalink.runtime.storage.manifest import Base

_MOST_STEPS = 64


@dataclass(frozen=True, eq=False)
class Pass:
    """What one pass takes.

    Attributes:
        inputs: ids or embeddings of its positions, shape ``(batch, seq)``.
        choice: places of the rows' tasks.
        mask: 1 for each position that may be seen, int64 with shape ``(batch, total)``; those of the cache come first.
        positions: position of each token among its row's, int64 with shape ``(batch, seq)``.
        places: whose logits are wanted, as indices in ``batch * seq``.
    """

    inputs: Inputs
    choice: Choice
    mask: Array
    positions: Array
    places: Array


@dataclass(eq=False)
class Step:
    """A decode step of one shape: its own executors, and its record where there is one."""

    executors: Executors
    stacks: tuple[Stack, ...]
    replay: Callable[[], None] | None


class EngineSpace:
    """Everything that one batch at a time needs. For one thread at a time.

    Attributes:
        queue: where the work goes.
        cache: keys and values; ``None`` for an encoder.
    """

    def __init__(self, common: Common) -> None:
        self._common = common
        self._lease = Lease(common.device)
        self.queue = self._lease.queue
        self._prefill = Executors(common.plans, self._lease, PREFILL)
        self._growing_step = Executors(common.plans, self._lease, DECODE)
        self._steps: dict[tuple[object, ...], Step] = {}
        try:
            self._open(self._lease)
        except BaseException:
            self.close()
            raise

    def _open(self, lease: Lease) -> None:
        base, profile = self._common.base, self._common.plans.profile
        self._front = FrontSpace(self._common, lease)
        engine = self._prefill[ENGINE]
        check_signature(engine, base)
        self._takes = frozenset(engine.inputs)
        batch, seq = profile.batch.largest, profile.seq.largest
        self._mask = lease.mirror(batch * profile.capacity, "int64")
        self._positions = lease.mirror(batch * seq, "int64")
        self._places = lease.mirror(profile.places, "int64")
        self._write_indices = lease.mirror(batch, "int64")
        self.cache: DeviceCache | None = None
        self._output_name, self._width, rows = "last_hidden_state", base.hidden_size, batch * seq
        if base.cache is not None:
            self._output_name, self._width, rows = "logits", base.vocab_size, profile.places
            kind = InPlaceCache if self.records else GrowingCache
            self.cache = kind(lease, base.cache, base.embedding_dtype, batch, profile.capacity)
        self._output = lease.mirror(rows * self._width, base.embedding_dtype)

    @property
    def records(self) -> bool:
        """Whether a decode step's shapes stay the same, so that it can be recorded."""
        return "write_indices" in self._takes

    @property
    def gathers_logits(self) -> bool:
        """Whether the engine gives logits only where they are wanted."""
        return "logits_at" in self._takes

    def prompt(self, wanted: Pass) -> Array:
        """Run positions of a prompt behind those in the cache.

        Returns:
            A view of pinned memory: logits at ``places``, shape ``(places, vocab)``, or of an encoder the hidden states
            at every position, shape ``(batch * seq, d)``.
        """
        self._write(wanted)
        self._enqueue(self._prefill, wanted)
        self.queue.wait()
        return self._received(wanted)

    def decode(self, wanted: Pass) -> Array:
        """Run one token of each row, from a record where there is one; gives what ``prompt`` does."""
        self._write(wanted)
        if not self.records:
            self._enqueue(self._growing_step, wanted)
        else:
            self._replay(wanted)
        self.queue.wait()
        return self._received(wanted)

    def close(self) -> None:
        """Give everything back."""
        for step in self._steps.values():
            step.executors.close()
        self._steps.clear()
        for executors in (self._prefill, self._growing_step):
            executors.close()
        self._lease.close()

    def _replay(self, wanted: Pass) -> None:
        """Enqueue a step from its record; the first of its shape is run as it is, and recorded.

        A record holds addresses and shapes, so each has executors that nobody binds anew.
        """
        assert self.cache is not None
        layers = self._front.layers(wanted.inputs, wanted.choice)
        parts = tuple((layer.activation, layer.stack) for layer in layers)
        key = (wanted.mask.shape, wanted.inputs.ids is None, wanted.inputs.modality is None, parts)
        step = self._steps.get(key)
        if step is None:
            self._forget_steps()
            executors = Executors(self._common.plans, self._lease, DECODE)
            self._enqueue(executors, wanted)
            # Recording wants an engine that has run with these shapes, and is not touched again.
            self.queue.wait()
            executors.is_bound = True
            length = self.cache.length
            replay = self.queue.record(lambda: self._enqueue(executors, wanted))
            self.cache.length = length
            self._steps[key] = Step(executors, tuple(stack for _, stack in parts), replay)
        elif step.replay is not None:
            step.replay()
            self.cache.advance(1)
        else:
            self._enqueue(step.executors, wanted)

    def _forget_steps(self) -> None:
        """Let go of the oldest records beyond a number, and of those that read a stack nobody fills any more."""
        stale = [key for key, step in self._steps.items() if not all(map(self._common.bank.is_current, step.stacks))]
        for key in [*stale, *list(self._steps)[: max(0, len(self._steps) + 1 - _MOST_STEPS)]]:
            if key in self._steps:
                self._steps.pop(key).executors.close()

    def _write(self, wanted: Pass) -> None:
        """Put everything into pinned memory; the queue is idle."""
        self._front.write(wanted.inputs, wanted.choice)
        self._mask.host(*wanted.mask.shape)[:] = wanted.mask
        self._positions.host(*wanted.positions.shape)[:] = wanted.positions
        self._places.host(len(wanted.places))[:] = wanted.places
        if self.cache is not None:
            self._write_indices.host(len(wanted.mask))[:] = self.cache.length

    def _enqueue(self, executors: Executors, wanted: Pass) -> None:
        """Enqueue copies, fronts and engine; reads nothing of ``wanted`` but shapes and where weights lie."""
        batch, seq = wanted.inputs.shape
        engine, shape = executors[ENGINE], self._output_shape(wanted)
        embeds = self._front.enqueue(executors, wanted.inputs, wanted.choice)
        mirrors = {
            "attention_mask": (self._mask, wanted.mask.shape),
            "position_ids": (self._positions, (batch, seq)),
            "logits_at": (self._places, wanted.places.shape),
            "write_indices": (self._write_indices, (batch,)),
        }
        taken = {name: pair for name, pair in mirrors.items() if name in self._takes}
        for mirror, size in taken.values():
            mirror.upload(self.queue, *size)
        if not executors.is_bound:
            engine.bind("inputs_embeds", embeds, (batch, seq, self._common.base.hidden_size))
            for name, (mirror, size) in taken.items():
                engine.bind(name, mirror.address, size)
            if self.cache is not None:
                self.cache.bind(engine, batch, seq)
            engine.bind(self._output_name, self._output.address, shape)
        engine.enqueue()
        self._output.download(self.queue, *shape)
        if self.cache is not None:
            self.cache.advance(seq)

    def _output_shape(self, wanted: Pass) -> tuple[int, ...]:
        batch, seq = wanted.inputs.shape
        if self.gathers_logits:
            return len(wanted.places), self._width
        return batch, seq, self._width

    def _received(self, wanted: Pass) -> Array:
        output = self._output.host(*self._output_shape(wanted))
        if self.gathers_logits:
            return output
        flat = output.reshape(-1, self._width)
        is_everything = self.cache is None or len(wanted.places) == len(flat)
        return flat if is_everything else flat[wanted.places]


def check_signature(engine: Executor, base: Base) -> None:
    """Check that a graph takes and gives what a base graph does; raises ``GraphError``."""
    wanted = {"inputs_embeds", "attention_mask"}
    given = {"last_hidden_state" if base.cache is None else "logits"}
    if base.cache is not None:
        for past, present in base.cache.names():
            wanted.add(past)
            given.add(present)
    optional = set() if base.cache is None else {"position_ids", "logits_at", "write_indices"}
    missing = sorted((wanted - engine.inputs.keys()) | (given - engine.outputs.keys()))
    unknown = sorted((engine.inputs.keys() - wanted - optional) | (engine.outputs.keys() - given))
    if missing or unknown:
        what = f"{missing[0]!r} is missing" if missing else f"{unknown[0]!r} is not of the contract"
        raise GraphError(f"the engine of {base.name}: {what}; it was built from another graph: build the engine again")
    received = engine.inputs["inputs_embeds"]
    if received.dtype != base.embedding_dtype or received.shape[-1] != base.hidden_size:
        raise GraphError(
            f"the engine of {base.name}: inputs_embeds is {received.dtype} of width {received.shape[-1]}, the base has "
            f"{base.embedding_dtype} of width {base.hidden_size}: build the engine again"
        )


def last_places(mask: Array) -> Array:
    """Column of the last token of each row."""
    last: Array = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
    return np.asarray(last)
