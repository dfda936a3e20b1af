"""What the host does to give a batch another loaded task, and nothing else: there is no queue to wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adalink.runtime.backends import open_backend
from adalink.runtime.deployment import Deployment
from adalink.runtime.device.adapter_weights import AdapterWeightPools, DeviceSharedAdapterGraph
from adalink.runtime.device.protocols import Device
from adalink.runtime.storage.manifest import Base
from adalink.runtime.tasks.registry import TaskRegistry

_LARGEST_RANK, _SLOTS = 256, 128


def host_swap(deployment: Deployment, backend: str) -> Callable[[int], object]:
    """Where adapters are applied in main memory: from a task's name to what a batch goes through."""
    tasks = TaskRegistry(deployment.path, deployment.manifest, open_backend(backend))
    names = deployment.tasks
    for name in names:
        tasks.resolve(name, 1)
    return lambda index: tasks.resolve(names[index % len(names)], 1)


def device_swap(deployment: Deployment, device: Device) -> Callable[[int], object]:
    """On a device: from a task's name to the number that the embedder reads."""
    tasks = TaskRegistry(deployment.path, deployment.manifest, _Loader())
    pools = AdapterWeightPools(device, deployment.manifest.base.hidden_size, _LARGEST_RANK, _SLOTS)
    names = deployment.tasks
    for name in names:
        pools.reserve(tasks.resolve(name, 1), 1).release()
    return lambda index: pools.reserve(tasks.resolve(names[index % len(names)], 1), 1).release()


class _Loader:
    """Loads tasks as a device takes them; everything else is the CPU's."""

    def __init__(self) -> None:
        self._backend = open_backend("onnxruntime-cpu")
        self.name = self._backend.name

    def open_bank(self, activation_key: str, graph: bytes, base: Base) -> DeviceSharedAdapterGraph:
        """See ``adalink.runtime.engine.Backend``."""
        return DeviceSharedAdapterGraph(activation_key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)
