"""What the host does to give a batch another loaded task, and nothing else: there is no queue to wait for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adalink.runtime.backends import open_backend
from adalink.runtime.deployment import Deployment
from adalink.runtime.device.adapter_weights import AdapterWeightPools, DeviceSharedAdapterGraph
from adalink.runtime.device.protocols import Device
from adalink.runtime.engine import Engine
from adalink.runtime.errors import BackendError
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.runtime.tasks.registry import TaskRegistry
from adalink.tools.common.forwarding_backend import ForwardingBackend

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
    tasks = TaskRegistry(deployment.path, deployment.manifest, _Loader(open_backend("onnxruntime-cpu")))
    pools = AdapterWeightPools(device, deployment.manifest.base.hidden_size, _LARGEST_RANK, _SLOTS)
    names = deployment.tasks
    for name in names:
        pools.reserve(tasks.resolve(name, 1), 1).release()
    return lambda index: pools.reserve(tasks.resolve(names[index % len(names)], 1), 1).release()


class _Loader(ForwardingBackend):
    """Loads tasks as a device takes them; everything else is the CPU's."""

    def open_bank(self, activation_key: str, graph: bytes, base: Base) -> DeviceSharedAdapterGraph:
        """See ``adalink.runtime.engine.Backend``."""
        return DeviceSharedAdapterGraph(activation_key)

    def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> Engine:
        """Never called: tasks alone are loaded."""
        raise BackendError(f"{graph}: no engine here")
