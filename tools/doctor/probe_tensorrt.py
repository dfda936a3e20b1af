"""Probe of TensorRT or TensorRT-RTX: builds an engine of one layer and, on a GPU, runs it."""

from __future__ import annotations

import ctypes
from typing import Any

from adalink.runtime.builds import count_builder_call
from adalink.runtime.device.gpus import Gpu, Gpus, find_gpus
from adalink.runtime.errors import BackendError
from adalink.runtime.trt.api import Api, load_api

# Built for where there is no GPU: the most common of the capabilities that TensorRT-RTX knows.
_ELSEWHERE = "sm86"
_VALUE = 2.5
_NO_GPU = "install the NVIDIA driver, on a machine with a GPU"


def try_tensorrt(backend: str) -> tuple[bool, str, str]:
    """Build and run ``y = -x``.

    Returns:
        Whether this machine can run engines, the finding, and advice; no advice where the package is missing.

    Raises:
        BackendError: the library is missing or refused.
    """
    api, gpus = load_api(backend), find_gpus()
    version = f"{api.trt.__name__} {api.version}"
    if not gpus.devices:
        if not api.is_rtx:
            api.make_builder()
            return False, f"{version} loads, but builds and runs on a GPU only: {gpus.reason}", _NO_GPU
        _build(api, _ELSEWHERE)
        advice = f"to run engines, {_NO_GPU}; to build them for other machines: 'adalink export engine --target'"
        return False, f"{version} builds engines ({_ELSEWHERE} was tried), but runs none: {gpus.reason}", advice
    where = describe_gpu(gpus.devices[0], gpus)
    if api.is_rtx and gpus.devices[0].capability not in api.targets:
        where += f", which is not among its targets {', '.join(api.targets)}"
    try:
        plan = _build(api, None)
        received = _run(api, plan)
    except BackendError as error:
        return False, f"on {where}: {error}", "update the driver, or use another backend"
    except ModuleNotFoundError as error:
        return False, f"{version} builds on {where}; the package {error.name} is not installed", ""
    if received != -_VALUE:
        return False, f"{version} on {where} computed -({_VALUE}) = {received}", "update driver and package"
    return True, f"{version} built and ran an engine on {where}", ""


def describe_gpu(gpu: Gpu, gpus: Gpus) -> str:
    """A GPU in a few words."""
    return f"{gpu.name} ({gpu.capability}, {gpu.memory_bytes / 1e9:.0f} GB, driver for CUDA {gpus.driver})"


def _build(api: Api, target: str | None) -> bytes:
    """A plan of one layer, for this GPU or for ``target``."""
    trt = api.trt
    builder = api.make_builder()
    network = builder.create_network(api.network_flags())
    layer = network.add_unary(network.add_input("x", trt.float32, (1,)), trt.UnaryOperation.NEG)
    layer.get_output(0).name = "y"
    network.mark_output(layer.get_output(0))
    config = builder.create_builder_config()
    if target is not None:
        api.set_targets(config, (target,))
    elif api.is_rtx:
        api.set_targets(config, ("current",))
    count_builder_call()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise api.error("an engine of one layer was not built", "install the package again")
    with memoryview(plan) as data:
        return bytes(data)


def _run(api: Api, plan: bytes) -> float:
    """``y`` for ``x = 2.5``."""
    from cuda.bindings import runtime as cuda  # pyright: ignore[reportMissingImports]  # of the extras for GPUs

    def must(result: Any) -> Any:
        """CUDA's result without its status; raises ``BackendError``."""
        status, *values = result
        if int(status) != 0:
            raise BackendError(f"CUDA says {cuda.cudaGetErrorString(status)[1].decode()}: update the driver")
        return values[0] if values else None

    runtime = api.make_runtime()
    engine = runtime.deserialize_cuda_engine(plan)
    context = None if engine is None else engine.create_execution_context()
    if context is None:
        raise api.error("an engine of one layer cannot be loaded", "update the driver")
    sent, received = (ctypes.c_float * 1)(_VALUE), (ctypes.c_float * 1)()
    stream = must(cuda.cudaStreamCreate())
    x, y = must(cuda.cudaMalloc(4)), must(cuda.cudaMalloc(4))
    kinds = cuda.cudaMemcpyKind
    must(cuda.cudaMemcpy(x, ctypes.addressof(sent), 4, kinds.cudaMemcpyHostToDevice))
    if not (context.set_tensor_address("x", int(x)) and context.set_tensor_address("y", int(y))):
        raise api.error("an engine of one layer takes no memory", "update the driver")
    if not context.execute_async_v3(int(stream)):
        raise api.error("an engine of one layer does not run", "update the driver")
    must(cuda.cudaStreamSynchronize(stream))
    must(cuda.cudaMemcpy(ctypes.addressof(received), y, 4, kinds.cudaMemcpyDeviceToHost))
    return float(received[0])
