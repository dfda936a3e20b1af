"""Step (c): memory, queues and CUDA graphs of ``runtime/device``, then whole engines behind its front end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnxruntime
from packaging.version import Version

from adalink.runtime.device.protocols import Device
from adalink.runtime.profile import parse_profile
from adalink.runtime.storage.manifest_io import read_manifest
from benchmarks.gpu_proof.measure.case import Case
from benchmarks.gpu_proof.measure.compare import compare_with_pytorch
from benchmarks.gpu_proof.measure.front import RANK, SLOTS, CudaPlans, FrontBackend
from benchmarks.gpu_proof.measure.ort import PROFILE
from benchmarks.gpu_proof.measure.swap import device_swap
from benchmarks.gpu_proof.measure.timing import microseconds
from benchmarks.gpu_proof.record import Record
from benchmarks.gpu_proof.step import Plan
from benchmarks.process import REPOSITORY

_NUMBERS = 1 << 20
# The first version with the operator that writes a cache in place.
_TENSOR_SCATTER = Version("1.24")
_SMALL_PROFILE = "batch=1:8:32,seq=1:32:64,past=0:64:255"


def run(record: Record, plan: Plan) -> None:
    """The parts, each by itself: what every engine needs first."""
    device, make_plans = open_device(plan)
    with record.part("memory"):
        record.figures(try_memory(device))
    with record.part("recording"):
        record.figures(try_recording(device))
    ways = {
        "growing cache": (False, False, 0.3),
        "cache in place": (True, False, 0.4),
        "cache in place, on the queue's stream": (True, True, 0.9),
    }
    profile = parse_profile(PROFILE if plan.is_full else _SMALL_PROFILE, _base(plan))
    for name, (in_place, shares_stream, share) in ways.items():
        if in_place and Version(onnxruntime.__version__) < _TENSOR_SCATTER:
            record.note(f"{name}: ONNX Runtime {onnxruntime.__version__} has no TensorScatter, {_TENSOR_SCATTER} has")
            continue
        with record.part(name):
            plans = partial(make_plans, shares_stream=shares_stream)
            backend = FrontBackend(device, plans, profile, in_place=in_place)
            _try_engine(record, plan, backend, device, share)


def _try_engine(record: Record, plan: Plan, backend: FrontBackend, device: Device, share: float) -> None:
    case = Case(record, plan, plan.deployment("float32"), backend)
    with case.deployment as deployment:
        compare_with_pytorch(record, plan, deployment, plan.small)
        case.mixed_answers(8)
        case.swaps(0.3 * share, device_swap(deployment, device))
        case.decode(1, 0.4 * share)
        case.decode(32, 0.4 * share)


def open_device(plan: Plan) -> tuple[Device, Callable[..., Any]]:
    """The GPU and what makes sessions on it; in a rehearsal a stand-in of the tests, CUDA's runtime on main memory."""
    if plan.has_gpu:
        from adalink.runtime.device.cuda import CudaDevice

        return CudaDevice("onnxruntime-cuda"), CudaPlans
    sys.path.append(str(REPOSITORY / "tests"))
    if find_spec("cuda") is not None and find_spec("cuda.bindings") is not None:
        lazy: Any = import_module("helpers.lazy_cuda")
        cuda = lazy.LazyCuda()
        return lazy.lazy_device(cuda), lambda graphs, profile, shares_stream: lazy.LazyPlans(cuda, graphs, profile)
    host: Any = import_module("helpers.host_device")
    plans = partial(host.HostPlans, rank=RANK, slots=SLOTS)
    return host.HostDevice(), lambda graphs, profile, shares_stream: plans(graphs, profile)


def try_memory(device: Device) -> dict[str, object]:
    """New memory is zero; what is sent comes back, also over a copy on the device."""
    rng = np.random.default_rng(3)
    sent, received = device.pinned((_NUMBERS,), np.float32), device.pinned((_NUMBERS,), np.float32)
    sent[:] = rng.standard_normal(_NUMBERS, np.float32)
    received[:] = np.nan
    queue, addresses = device.open_queue(), [device.allocate(sent.nbytes) for _ in range(2)]
    queue.download(received, addresses[0])
    queue.wait()
    is_zero = not received.any()
    queue.upload(addresses[0], sent)
    queue.copy(addresses[1], addresses[0], sent.nbytes)
    queue.download(received, addresses[1])
    queue.wait()
    for address in addresses:
        device.free(address)
    queue.close()
    found: dict[str, object] = {"new_is_zero": is_zero, "comes_back": bool(np.array_equal(sent, received))}
    assert all(found.values()), found
    return found


def try_recording(device: Device) -> dict[str, object]:
    """A recording reads pinned memory anew whenever it is replayed, and is not executed while it is made."""
    rng = np.random.default_rng(4)
    sent, received = device.pinned((_NUMBERS,), np.float32), device.pinned((_NUMBERS,), np.float32)
    queue, addresses = device.open_queue(), [device.allocate(sent.nbytes) for _ in range(2)]

    def work() -> None:
        queue.upload(addresses[0], sent)
        queue.copy(addresses[1], addresses[0], sent.nbytes)
        queue.download(received, addresses[1])

    sent[:] = rng.standard_normal(_NUMBERS, np.float32)
    received[:] = -1
    replay = queue.record(work)
    queue.wait()
    assert replay is not None, "copies alone cannot be recorded"
    was_executed = not bool((received == -1).all())
    same = []
    for _ in range(3):
        sent[:] = rng.standard_normal(_NUMBERS, np.float32)
        replay()
        queue.wait()
        same.append(bool(np.array_equal(sent, received)))
    found: dict[str, object] = {
        "executed_while_recorded": was_executed,
        "replays_right": sum(same),
        "replays": len(same),
    }
    assert not was_executed, found
    assert all(same), found

    def once(index: int) -> None:
        replay()
        queue.wait()

    found |= {"replay_and_wait": microseconds(once, 1000, 5.0)}
    queue.close()
    return found


def _base(plan: Plan) -> Any:
    return read_manifest(plan.deployment("float32")).base
