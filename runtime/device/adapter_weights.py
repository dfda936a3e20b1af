"""Adapter weights on the device: one pool for each activation, in which each row selects its task by slot.

A pool holds the recently used tasks of one activation. Loading a task copies its weights into a free slot once. From
then on, switching tasks changes a number in ``task_index``. Slot 0 of every pool is the base model.
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
from adalink.runtime.storage.adapter_spec import ACTIVATIONS
from adalink.runtime.tasks.adapter_mapping import AdapterGroup, AdapterMapping

_RANKS = 16
_FIRST_SLOTS = 16
Key = tuple[str, int]


class DeviceSharedAdapterGraph:
    """The shared adapter graph on a device: only its activation, since the embedders compute the adapters."""

    def __init__(self, activation_key: str) -> None:
        self.activation = activation_key.removesuffix("_bias")

    def run(self, inputs_embeds: Array, weights: Mapping[str, Array]) -> Array:
        """Never called: on a device, an embedder reads the weights from a pool."""
        raise AssertionError("adapters on a device are applied by its embedder")


class AdapterWeightPool:
    """Weights of many tasks of one activation, float32, padded with zeros to one rank.

    Attributes:
        rank: rank of every slot.
        slots: number of slots; slot 0 is the base model.
        shapes: shape of each array, by the name of the embedder's input.
        addresses: device address of each array.
        table: the task in each slot.
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
        # Freed with the last batch and the last recorded step that read it.
        weakref.finalize(self, _free_all, device, self.addresses)
        for name, shape in self.shapes.items():
            self.addresses[name] = device.allocate(4 * int(np.prod(shape)))
        self.fill(0, {})

    def fill(self, slot: int, weights: Mapping[str, Array]) -> None:
        """Copy one task's weights into a slot, and wait for the copy.

        Args:
            slot: the slot's number.
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
    """One adapter pass of a batch: its tasks of one activation and one modality.

    Attributes:
        activation: selects the embedder.
        pool: the weights.
        task_index: slot of each row's weights, int64 with shape ``(batch,)``; 0 for the base model.
        modality: modality of the adapted positions, an index in the base's modalities.
        keys: tasks whose slots are in use.
    """

    activation: str
    pool: AdapterWeightPool
    task_index: Array
    modality: int
    keys: list[Key] = field(default_factory=list)


class SlotReservation:
    """Slots of a batch's tasks, reserved until ``release``."""

    def __init__(self, pools: AdapterWeightPools, adapter_passes: list[AdapterPass]) -> None:
        self._pools = pools
        self.adapter_passes = adapter_passes

    def release(self) -> None:
        """Release the slots to other tasks."""
        self._pools.release(self.adapter_passes)
        self.adapter_passes = []


class AdapterWeightPools:
    """Adapter weight pools of a deployment, by activation; safe for several threads."""

    def __init__(self, device: Device, hidden_size: int, largest_rank: int, largest_slots: int) -> None:
        self._device = device
        self._queue = device.open_queue()
        self._hidden_size = hidden_size
        self._largest_rank = largest_rank
        self._largest_slots = largest_slots
        self._pools: dict[str, AdapterWeightPool] = {}
        self._lock = threading.Lock()
        # For batches of the base model alone: the embedders' weight inputs must be bound.
        self._base_pool: AdapterWeightPool | None = AdapterWeightPool(device, self._queue, _RANKS, 1, hidden_size)

    def reserve(self, tasks: AdapterMapping, batch: int) -> SlotReservation:
        """Reserve a slot for each task of a batch; tasks without one are loaded now.

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
        """Release the slots of a batch."""
        with self._lock:
            self._release(adapter_passes)

    def is_current(self, pool: AdapterWeightPool) -> bool:
        """Whether new tasks are loaded into this pool."""
        return pool is self._base_pool or pool in self._pools.values()

    def base_pass(self, batch: int) -> AdapterPass:
        """The adapter pass of a batch in which no row has a task."""
        assert self._base_pool is not None, "the engine is closed"
        return AdapterPass(ACTIVATIONS[0], self._base_pool, np.zeros(batch, np.int64), 0)

    def close(self) -> None:
        """Drop all pools; memory is freed with the last batch that reads it."""
        self._pools.clear()
        self._base_pool = None
        self._queue.close()

    def _pool_with_space(self, activation: str, groups: list[AdapterGroup]) -> AdapterWeightPool:
        """The pool of an activation; a larger one if slots or rank do not suffice for the batch."""
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
            return pool  # the least recently used tasks are evicted instead
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
    """Assign a slot of the pool to a task, and write its number into the task's rows."""
    key, pool = _key(group), adapter_pass.pool
    assignment = pool.table.take(key)
    if assignment is None:
        raise BackendError(
            f"all {pool.slots - 1} device slots of this activation are in use by running batches: wait for one of "
            "them, or send fewer tasks at a time"
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
