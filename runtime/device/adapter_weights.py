"""The tasks of a batch on the device: stacks of weights, from which each row picks its own by index.

A stack holds the weights of all tasks with one activation that were used lately. Loading a task copies its weights into
a free place once; from then on a swap is another number in ``task_index``. Place 0 of every stack is the base model.
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
from adalink.runtime.tasks.adapter_mapping import AdapterGroup, AdapterMapping

_RANKS = 16
_FIRST_SLOTS = 16
Key = tuple[str, int]


class DeviceSharedAdapterGraph:
    """The shared adapter graph on a device: only its name, since the arithmetic is in the embedders."""

    def __init__(self, activation_key: str) -> None:
        self.activation = activation_key.removesuffix("_bias")

    def run(self, inputs_embeds: Array, weights: Mapping[str, Array]) -> Array:
        """Not for devices, where an embedder reads the weights from a stack."""
        raise AssertionError("tasks on a device are applied by its embedder")


class AdapterWeightPool:
    """Weights of many tasks of one activation, float32, filled up with zeros to one rank.

    Attributes:
        rank: of every set.
        slots: places, the first for the base model.
        shapes: shape of each of the arrays by the name of an embedder's input.
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

    def fill(self, slot: int, weights: Mapping[str, Array]) -> None:
        """Copy one task's weights into a place, and wait until they are there.

        Args:
            slot: which.
            weights: arrays of shape ``(1, ...)`` as ``adalink.runtime.tasks.adapter_mapping.bank_weights`` gives them.
        """
        for name, shape in self.shapes.items():
            staged = self._staging[name]
            staged[:] = 0
            matrix = weights.get(name)
            if matrix is not None:
                staged[: matrix.shape[1], : matrix.shape[2]] = matrix[0]
            self._queue.upload(self.addresses[name] + slot * 4 * int(np.prod(shape[1:])), staged)
        self._queue.wait()


def _free_all(device: Device, addresses: Mapping[str, int]) -> None:
    for address in addresses.values():
        device.free(address)


@dataclass(eq=False)
class AdapterPass:
    """Tasks of one activation and one modality in a batch.

    Attributes:
        activation: whose front is run.
        pool: where the weights lie.
        task_index: place of each row's weights, int64 with shape ``(batch,)``; 0 for the base model.
        modality: which positions; an index in the base's modalities.
        keys: whose places are in use.
    """

    activation: str
    pool: AdapterWeightPool
    task_index: Array
    modality: int
    keys: list[Key] = field(default_factory=list)


class SlotReservation:
    """The places of a batch's tasks, held until ``release``."""

    def __init__(self, pools: AdapterWeightPools, adapter_passes: list[AdapterPass]) -> None:
        self._pools = pools
        self.adapter_passes = adapter_passes

    def release(self) -> None:
        """Let the places be used for other tasks."""
        self._pools.release(self.adapter_passes)
        self.adapter_passes = []


class AdapterWeightPools:
    """The stacks of a deployment, by activation; safe for calls from several threads."""

    def __init__(self, device: Device, hidden_size: int, largest_rank: int, largest_slots: int) -> None:
        self._device = device
        self._queue = device.open_queue()
        self._hidden_size = hidden_size
        self._largest_rank = largest_rank
        self._largest_slots = largest_slots
        self._pools: dict[str, AdapterWeightPool] = {}
        self._lock = threading.Lock()
        # For a batch of the base model alone; the embedders need something to be bound.
        self._plain: AdapterWeightPool | None = AdapterWeightPool(device, self._queue, _RANKS, 1, hidden_size)

    def reserve(self, tasks: AdapterMapping, batch: int) -> SlotReservation:
        """Give each task of a batch a place; one that has none is loaded now.

        Raises:
            BackendError: a task's rank is larger than the embedders take, or the device's memory is full.
        """
        by_activation: dict[str, list[AdapterGroup]] = {}
        for group in tasks.groups:
            assert isinstance(group.graph, DeviceSharedAdapterGraph)
            by_activation.setdefault(group.graph.activation, []).append(group)
        adapter_passes: dict[tuple[str, int], AdapterPass] = {}
        with self._lock:
            try:
                for activation, groups in by_activation.items():
                    pool = self._pool_with_space(activation, groups)
                    for group in groups:
                        adapter_pass = adapter_passes.get((activation, group.modality))
                        if adapter_pass is None:
                            adapter_pass = AdapterPass(activation, pool, np.zeros(batch, np.int64), group.modality)
                            adapter_passes[activation, group.modality] = adapter_pass
                        _assign_slot(group, adapter_pass)
            except BackendError:
                self._release(list(adapter_passes.values()))
                raise
        return SlotReservation(self, list(adapter_passes.values()))

    def release(self, adapter_passes: list[AdapterPass]) -> None:
        """End the use of a batch's places."""
        with self._lock:
            self._release(adapter_passes)

    def is_current(self, pool: AdapterWeightPool) -> bool:
        """Whether tasks are loaded into this stack."""
        return pool is self._plain or pool in self._pools.values()

    def plain(self, batch: int) -> AdapterPass:
        """What an embedder is fed with when no row has a task."""
        assert self._plain is not None, "the engine is closed"
        return AdapterPass(ACTIVATIONS[0], self._plain, np.zeros(batch, np.int64), 0)

    def close(self) -> None:
        """Forget every task; its memory goes with the last batch that reads it."""
        self._pools.clear()
        self._plain = None
        self._queue.close()

    def _pool_with_space(self, activation: str, groups: list[AdapterGroup]) -> AdapterWeightPool:
        """The stack of an activation, larger than before if it has no free places for a batch or too small a rank."""
        rank = max(group.weights["down"].shape[1] for group in groups)
        if rank > self._largest_rank:
            raise BackendError(
                f"a task has rank {rank}, this engine's embedders take at most {self._largest_rank}: train the adapter "
                "with a smaller rank, or run it with another backend"
            )
        keys = {_key(group) for group in groups}
        pool = self._pools.get(activation)
        if pool is not None and pool.rank >= rank:
            free = pool.slots - 1 - len(pool.table)
            if sum(key not in pool.table for key in keys) <= free or pool.slots >= self._largest_slots:
                return pool
        needed = max(_FIRST_SLOTS, 2 * (len(keys) + 1), 0 if pool is None else 2 * pool.slots)
        rank = max(-(-rank // _RANKS) * _RANKS, 0 if pool is None else pool.rank)
        slots = min(needed, self._largest_slots)
        try:
            larger = AdapterWeightPool(
                self._device, self._queue, min(rank, self._largest_rank), slots, self._hidden_size
            )
        except BackendError:
            if pool is None or pool.rank < rank:
                raise
            return pool  # what was not used for the longest time makes room instead
        self._pools[activation] = larger
        return larger

    def _release(self, adapter_passes: list[AdapterPass]) -> None:
        for adapter_pass in adapter_passes:
            for key in adapter_pass.keys:
                adapter_pass.pool.table.release(key)
            adapter_pass.keys = []


def _key(group: AdapterGroup) -> Key:
    return group.digest, group.modality


def _assign_slot(group: AdapterGroup, adapter_pass: AdapterPass) -> None:
    """Give a task a place in a layer's stack and its rows the number of it."""
    key, pool = _key(group), adapter_pass.pool
    assignment = pool.table.take(key)
    if assignment is None:
        raise BackendError(
            f"the {pool.slots - 1} places of this activation on the device are all in use by batches that run: wait "
            "for one of them, or send fewer tasks at a time"
        )
    slot, is_new = assignment
    if is_new:
        try:
            pool.fill(slot, group.weights)
        except BackendError:
            pool.table.forget(key)
            raise
    adapter_pass.keys.append(key)
    adapter_pass.task_index[slice(None) if group.rows is None else group.rows] = slot
