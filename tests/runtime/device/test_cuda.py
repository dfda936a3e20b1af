"""Calls of the CUDA runtime through NVIDIA's bindings, where there is no driver: each is accepted, and each refused."""

from __future__ import annotations

import numpy as np
import pytest

from adalink.runtime.device.cuda import CudaDevice, CudaQueue
from adalink.runtime.device.gpus import find_gpus
from adalink.runtime.errors import BackendError, BackendUnavailableError

cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
pytestmark = pytest.mark.skipif(bool(find_gpus().devices), reason="there is a GPU: test_gpu.py uses it")
REFUSED = "CUDA refused: cudaErrorInsufficientDriver .*insufficient.*doctor"


@pytest.fixture
def device() -> CudaDevice:
    """A device that did not ask whether there is one."""
    device = CudaDevice.__new__(CudaDevice)
    device._attach(cuda)
    return device


@pytest.fixture
def queue(device: CudaDevice) -> CudaQueue:
    return CudaQueue(device, cuda, cuda.cudaStream_t(0))


def test_a_device_says_what_is_missing() -> None:
    with pytest.raises(BackendUnavailableError, match=r"backend tensorrt needs an NVIDIA GPU.*InsufficientDriver"):
        CudaDevice("tensorrt")


def test_memory_calls_reach_the_driver(device: CudaDevice) -> None:
    with pytest.raises(BackendError, match=REFUSED):
        device.allocate(1024)
    with pytest.raises(BackendError, match=REFUSED):
        device.pinned((4, 5), np.float32)
    with pytest.raises(BackendError, match=REFUSED):
        device.open_queue()
    device.free(4096)  # not ours: nothing happens


def test_queue_calls_reach_the_driver(queue: CudaQueue) -> None:
    array = np.zeros(16, np.float32)
    for call in (
        lambda: queue.upload(4096, array),
        lambda: queue.download(array, 4096),
        lambda: queue.copy(4096, 8192, 64),
        queue.wait,
        lambda: queue.record(lambda: None),
    ):
        with pytest.raises(BackendError, match=REFUSED):
            call()
    assert queue.handle == 0
    queue.close()
