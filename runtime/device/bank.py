"""The tasks of a batch on the device: stacks of weights, from which each row picks its own by index.

A stack holds the weights of all tasks with one activation that were used lately. Loading a task copies its weights into
a free place once; from then on a swap is another number in ``task_index``. Place 0 of every stack is the plain base.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.device.protocols import Device, Queue
from adalink.runtime.device.slots import SlotTable
from adalink.runtime.errors import BackendError
from adalink.runtime.storage.adapter import ACTIVATIONS
from adalink.runtime.tasks.adapter_mapping import Part, Selection

_RANKS = 16
_FIRST_SLOTS = 16
Key = tuple[str, int]


class DeviceKind:
    """The bank graph of a kind on a device: only its name, since the arithmetic is in the fronts."""

    def __init__(self, kind: str) -> None:
        self.activation = kind.removesuffix("_bias")

    def run(self, inputs_embeds: Array, weights: Mapping[str, Array]) -> Array:
        """Not for devices, where a front reads the weights from a stack."""
        raise AssertionError("tasks on a device are applied by its front")


class Stack:
    """Weights of many tasks of one activation, float32, filled up with zeros to one rank.

    Attributes:
        rank: of every set.
        slots: places, the first for the plain base.
        shapes: shape of each of the arrays by the name of a front's input.
        addresses: where each of them lies.
        table: whose weights lie where.
    """

    def __init__(self, device: Device, queue: Queue, rank: int, slots: int, hidden_size: int) -> None:
        self.rank = rank
        self.slots = slots
        self.shapes: dict[str, tuple[int, ...]] = {
            "down": (slots, rank, hidden_size),
            "up": (slots, hidden_size, rank),
            "down_bias": (slots, 1, rank),
            "up_bias": (slots, 1, hidden_size),
        }
        self.table: SlotTable[Key] = SlotTable(slots)
        self._queue = queue
        self._staging = {name: device.pinned(shape[1:], np.float32) for name, shape in self.shapes.items()}
        self.addresses: dict[str, int] = {}
        # Freed when the last batch and the last recorded step that read it are gone.
        weakref.finalize(self, _free_all, device, self.addresses)
        for name, shape in self.shapes.items():
            self.addresses[name] = device.allocate(4 * int(np.prod(shape)))
        self.fill(0, {})

    def fill(self, place: int, weights: Mapping[str, Array]) -> None:
        """Copy one task's weights into a place, and wait until they are there.

        Args:
            place: which.
            weights: arrays of shape ``(1, ...)`` as ``adalink.runtime.tasks.adapter_mapping.bank_weights`` gives them.
        """
        for name, shape in self.shapes.items():
            staged = self._staging[name]
            staged[:] = 0
            own = weights.get(name)
            if own is not None:
                staged[: own.shape[1], : own.shape[2]] = own[0]
            self._queue.upload(self.addresses[name] + place * 4 * int(np.prod(shape[1:])), staged)
        self._queue.wait()


def _free_all(device: Device, addresses: Mapping[str, int]) -> None:
    for address in addresses.values():
        device.free(address)


@dataclass(eq=False)
class Layer:
    """Tasks of one activation and one modality in a batch.

    Attributes:
        activation: whose front is run.
        stack: where the weights lie.
        task_index: place of each row's weights, int64 with shape ``(batch,)``; 0 for the plain base.
        modality: which positions; an index in the base's modalities.
        keys: whose places are in use.
    """

    activation: str
    stack: Stack
    task_index: Array
    modality: int
    keys: list[Key] = field(default_factory=list)


class Choice:
    """The places of a batch's tasks, held until ``release``."""

    def __init__(self, bank: DeviceBank, layers: list[Layer]) -> None:
        self._bank = bank
        self.layers = layers

    def release(self) -> None:
        """Let the places be used for other tasks."""
        self._bank.release(self.layers)
        self.layers = []


class DeviceBank:
    """The stacks of a deployment, by activation; safe for calls from several threads."""

    def __init__(self, device: Device, hidden_size: int, largest_rank: int, largest_slots: int) -> None:
        self._device = device
        self._queue = device.open_queue()
        self._hidden_size = hidden_size
        self._largest_rank = largest_rank
        self._largest_slots = largest_slots
        self._stacks: dict[str, Stack] = {}
        self._lock = threading.Lock()
        # For a batch of the plain base alone; the fronts need something to be bound.
        self._plain: Stack | None = Stack(device, self._queue, _RANKS, 1, hidden_size)

    def choose(self, tasks: Selection, batch: int) -> Choice:
        """Give each task of a batch a place; one that has none is loaded now.

        Raises:
            BackendError: a task's rank is larger than the fronts take, or the device's memory is full.
        """
        groups: dict[str, list[Part]] = {}
        for part in tasks.parts:
            assert isinstance(part.graph, DeviceKind)
            groups.setdefault(part.graph.activation, []).append(part)
        layers: dict[tuple[str, int], Layer] = {}
        with self._lock:
            try:
                for activation, parts in groups.items():
                    stack = self._roomy(activation, parts)
                    for part in parts:
                        layer = layers.get((activation, part.modality))
                        if layer is None:
                            layer = Layer(activation, stack, np.zeros(batch, np.int64), part.modality)
                            layers[activation, part.modality] = layer
                        _place(part, layer)
            except BackendError:
                self._release(list(layers.values()))
                raise
        return Choice(self, list(layers.values()))

    def release(self, layers: list[Layer]) -> None:
        """End the use of a batch's places."""
        with self._lock:
            self._release(layers)

    def is_current(self, stack: Stack) -> bool:
        """Whether tasks are loaded into this stack."""
        return stack is self._plain or stack in self._stacks.values()

    def plain(self, batch: int) -> Layer:
        """What a front is fed with when no row has a task."""
        assert self._plain is not None, "the engine is closed"
        return Layer(ACTIVATIONS[0], self._plain, np.zeros(batch, np.int64), 0)

    def close(self) -> None:
        """Forget every task; its memory goes with the last batch that reads it."""
        self._stacks.clear()
        self._plain = None
        self._queue.close()

    def _roomy(self, activation: str, parts: list[Part]) -> Stack:
        """The stack of an activation, larger than before if it has no free places for a batch or too small a rank."""
        rank = max(part.weights["down"].shape[1] for part in parts)
        if rank > self._largest_rank:
            raise BackendError(
                f"a task has rank {rank}, this engine's fronts take at most {self._largest_rank}: train the adapter "
                "with a smaller rank, or run it with another backend"
            )
        keys = {_key(part) for part in parts}
        stack = self._stacks.get(activation)
        if stack is not None and stack.rank >= rank:
            free = stack.slots - 1 - len(stack.table)
            if sum(key not in stack.table for key in keys) <= free or stack.slots >= self._largest_slots:
                return stack
        wanted = max(_FIRST_SLOTS, 2 * (len(keys) + 1), 0 if stack is None else 2 * stack.slots)
        rank = max(-(-rank // _RANKS) * _RANKS, 0 if stack is None else stack.rank)
        slots = min(wanted, self._largest_slots)
        try:
            larger = Stack(self._device, self._queue, min(rank, self._largest_rank), slots, self._hidden_size)
        except BackendError:
            if stack is None or stack.rank < rank:
                raise
            return stack  # what was not used for the longest time makes room instead
        self._stacks[activation] = larger
        return larger

    def _release(self, layers: list[Layer]) -> None:
        for layer in layers:
            for key in layer.keys:
                layer.stack.table.release(key)
            layer.keys = []


def _key(part: Part) -> Key:
    return part.digest, part.modality


def _place(part: Part, layer: Layer) -> None:
    """Give a task a place in a layer's stack and its rows the number of it."""
    key, stack = _key(part), layer.stack
    taken = stack.table.take(key)
    if taken is None:
        raise BackendError(
            f"the {stack.slots - 1} places of this activation on the device are all in use by batches that run: wait "
            "for one of them, or send fewer tasks at a time"
        )
    place, is_new = taken
    if is_new:
        try:
            stack.fill(place, part.weights)
        except BackendError:
            stack.table.forget(key)
            raise
    layer.keys.append(key)
    layer.task_index[slice(None) if part.rows is None else part.rows] = place
