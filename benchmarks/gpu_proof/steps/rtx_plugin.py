"""Step (e): TensorRT-RTX as a provider of ONNX Runtime."""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.gpu_proof.measure.case import Case
from benchmarks.gpu_proof.measure.compare import compare_with_pytorch
from benchmarks.gpu_proof.measure.ort import stand_in, wide_backend
from benchmarks.gpu_proof.measure.swap import host_swap
from benchmarks.gpu_proof.record import NotHereError, Record
from benchmarks.gpu_proof.step import Plan

_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


def run(record: Record, plan: Plan) -> None:
    """As step (b), shorter."""
    if plan.has_gpu and find_spec(_PLUGIN) is None:
        raise NotHereError(f"{_PLUGIN} is not installed (extra tensorrt-rtx-provider)")
    try_provider(record, plan, "onnxruntime-tensorrt-rtx")


def try_provider(record: Record, plan: Plan, backend: str) -> None:
    """Open, compare with PyTorch, time."""
    name = stand_in(backend, plan)
    case = Case(record, plan, plan.deployment("float32"), wide_backend(name, plan))
    with case.deployment as deployment:
        compare_with_pytorch(record, plan, deployment, plan.small)
        case.mixed_answers(8)
        case.decode(1, 0.4)
        case.swaps(0.4, host_swap(deployment, name))
        case.decode(32, 0.6)
