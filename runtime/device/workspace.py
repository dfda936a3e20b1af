"""What one call at a time needs on the device: a queue, the fronts, and buffers allocated once at their largest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from adalink.runtime.arrays import Array
from adalink.runtime.device.bank import Choice, DeviceBank, Layer
from adalink.runtime.device.inputs import Inputs
from adalink.runtime.device.protocols import Device, Executor, Lease, Mirror
from adalink.runtime.profile import Profile
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.safetensors import as_stored

ENGINE, VISION = "engine", "vision"
PREFILL, DECODE = 0, 1


class Plans(Protocol):
    """The compiled graphs of one engine; safe for calls from several threads."""

    @property
    def profile(self) -> Profile:
        """What the engine takes."""

    @property
    def largest_rank(self) -> int:
        """Largest rank that the fronts take."""

    @property
    def largest_slots(self) -> int:
        """Most sets of weights that the fronts take."""

    def executor(self, name: str, profile: int, lease: Lease) -> Executor:
        """A new executor of ``"engine"``, ``"vision"`` or a front such as ``"gelu.ids"``, for the queue of a lease.

        Raises:
            BackendError: there is no such graph, or the device has not enough memory.
        """

    def close(self) -> None:
        """Give it all back."""


class Executors:
    """The executors of one way to run the graphs, opened when they are first used.

    Attributes:
        is_bound: whether all is bound for good, as a recorded step wants it; nothing is bound anew then.
    """

    def __init__(self, plans: Plans, lease: Lease, profile: int) -> None:
        self._plans = plans
        self._lease = lease
        self._profile = profile
        self._open: dict[str, Executor] = {}
        self.is_bound = False

    def __getitem__(self, name: str) -> Executor:
        if name not in self._open:
            self._open[name] = self._plans.executor(name, self._profile if name == ENGINE else 0, self._lease)
        return self._open[name]

    def close(self) -> None:
        """Give them back."""
        for executor in self._open.values():
            executor.close()
        self._open.clear()


@dataclass(frozen=True)
class Common:
    """What the workspaces of an engine share.

    Attributes:
        device: where everything lies.
        plans: the compiled graphs.
        bank: weights of the tasks.
        table: address of the embedding table.
        base: the contract.
    """

    device: Device
    plans: Plans
    bank: DeviceBank
    table: int
    base: Base


class FrontSpace:
    """Buffers that turn ids and tasks into the embeddings that an engine takes. For one thread at a time."""

    def __init__(self, common: Common, lease: Lease) -> None:
        profile, width = common.plans.profile, common.base.hidden_size
        positions = profile.batch.largest * profile.seq.largest
        self._common = common
        self._lease = lease
        self._ids = lease.mirror(positions, "int64")
        self._embeds = [lease.mirror(positions * width, common.base.embedding_dtype) for _ in range(2)]
        # For each layer in turn: which row has which task, and which positions are of its modality.
        self._indices: list[tuple[Mirror, Mirror]] = []

    def write(self, inputs: Inputs, choice: Choice) -> None:
        """Put what a pass needs into pinned memory."""
        batch, seq = inputs.shape
        if inputs.ids is not None:
            self._ids.host(batch, seq)[:] = inputs.ids
        else:
            assert inputs.embeds is not None
            dtype = self._common.base.embedding_dtype
            self._embeds[0].host(batch, seq, self._common.base.hidden_size)[:] = as_stored(inputs.embeds, dtype)
        for layer, (index, chosen) in self._layers_with_buffers(inputs, choice):
            index.host(batch)[:] = layer.task_index
            chosen.host(batch, seq)[:] = True if inputs.modality is None else inputs.modality == layer.modality

    def layers(self, inputs: Inputs, choice: Choice) -> Sequence[Layer]:
        """What a pass goes through in turn; for token ids, the first one looks them up."""
        layers = [layer for layer in choice.layers if inputs.modality is not None or layer.modality == 0]
        if inputs.ids is not None and (not layers or inputs.modality is not None):
            return [self._common.bank.plain(inputs.shape[0]), *layers]
        return layers

    def enqueue(self, executors: Executors, inputs: Inputs, choice: Choice) -> int:
        """Enqueue the copies and the fronts of what was written; the address of the engine's embeddings."""
        batch, seq = inputs.shape
        shape, queue = (batch, seq, self._common.base.hidden_size), self._lease.queue
        current, other = self._embeds
        if inputs.ids is None:
            current.upload(queue, *shape)
        else:
            self._ids.upload(queue, batch, seq)
        is_lookup = inputs.ids is not None
        for layer, (index, chosen) in self._layers_with_buffers(inputs, choice):
            front = executors[f"{layer.activation}.{'ids' if is_lookup else 'embeds'}"]
            index.upload(queue, batch)
            if not is_lookup:
                chosen.upload(queue, batch, seq)
            if not executors.is_bound:
                source = self._ids if is_lookup else current
                _bind_front(front, layer, source.address, self._common.table, (batch, seq, self._common.base))
                front.bind("task_index", index.address, (batch,))
                if not is_lookup:
                    front.bind("is_adapted", chosen.address, (batch, seq))
                front.bind("adapted_embeds", other.address, shape)
            front.enqueue()
            current, other, is_lookup = other, current, False
        return current.address

    def read(self, address: int, *shape: int) -> Array:
        """What lies at an address that ``enqueue`` gave, once it is there; a view of pinned memory."""
        mirror = next(mirror for mirror in self._embeds if mirror.address == address)
        mirror.download(self._lease.queue, *shape)
        self._lease.queue.wait()
        return mirror.host(*shape)

    def _layers_with_buffers(self, inputs: Inputs, choice: Choice) -> Iterable[tuple[Layer, tuple[Mirror, Mirror]]]:
        """What a pass goes through, each with its buffers; as many as any pass has needed are kept."""
        profile, layers = self._common.plans.profile, self.layers(inputs, choice)
        while len(self._indices) < len(layers):
            batch = profile.batch.largest
            pair = self._lease.mirror(batch, "int64"), self._lease.mirror(batch * profile.seq.largest, "bool")
            self._indices.append(pair)
        return zip(layers, self._indices, strict=False)


def _bind_front(front: Executor, layer: Layer, source: int, table: int, size: tuple[int, int, Base]) -> None:
    """Bind what a front reads: ids and the table where it takes them, else embeddings; and the stack of weights."""
    batch, seq, base = size
    if "input_ids" in front.inputs:
        front.bind("input_ids", source, (batch, seq))
        front.bind("table", table, (base.vocab_size, base.hidden_size))
    else:
        front.bind("inputs_embeds", source, (batch, seq, base.hidden_size))
    for name, address in layer.stack.addresses.items():
        front.bind(name, address, layer.stack.shapes[name])
