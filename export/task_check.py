"""A task graph is run once before it is registered, against the method in numpy float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adalink.export.task_graph import OUTPUT_NAME
from adalink.runtime.adapter import Adapter
from adalink.runtime.errors import GraphError

if TYPE_CHECKING:
    import onnxruntime as ort

Float64 = npt.NDArray[np.float64]

_UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Below its normal range a dtype rounds by an absolute amount.
_SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
# How far a rounding of the activation's input can be stretched (the largest slope), for the two with slope above 1.
_SLOPE = {"gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1}
# What an implementation of erf, tanh or sigmoid in float32 may be off, in roundoffs of the larger of input and 1.
_ACTIVATION_ROUNDOFFS = 8


def check_task_graph(graph: bytes, adapter: Adapter, dtype: str, embeds: npt.NDArray[np.float32]) -> None:
    """Run ``graph`` in ONNX Runtime on ``embeds`` as each modality and as none.

    Args:
        graph: the serialized graph.
        adapter: what it was made from.
        dtype: the graph's dtype; ``embeds`` are rounded to it first.
        embeds: shape ``(rows, d)``, exact in ``dtype``.

    Raises:
        GraphError: an element is outside the rounding bound, or a position without a modality was changed.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = adapter.config.modalities
    for index in range(len(names)) if len(names) == 1 else range(-1, len(names)):
        modality = np.full((1, len(embeds)), index, np.int64) if len(names) > 1 else None
        received = _run(session, embeds[None], modality, dtype)[0]
        if index < 0:
            if not np.array_equal(received, embeds):
                raise GraphError("task graph: positions without a modality were changed; expected them bit for bit")
            continue
        expected, bound = adapt_with_bound(adapter, names[index], embeds.astype(np.float64), dtype)
        ratio = np.abs(received - expected) / bound
        if not (ratio <= 1.0).all():
            row, column = np.unravel_index(np.argmax(ratio), ratio.shape)
            raise GraphError(
                f"task graph, modality {names[index]!r}: element {column} of row {row} is {received[row, column]!r}, "
                f"expected {expected[row, column]!r} within {bound[row, column]:.3g}: the graph does not compute the "
                "adapter, so it was not registered; report this with the versions of onnx and onnxruntime"
            )


def adapt_with_bound(adapter: Adapter, modality: str, x: Float64, dtype: str) -> tuple[Float64, Float64]:
    """The method in float64, and a componentwise bound of what float32 arithmetic and one cast may differ by.

    The bound follows the standard model of rounding: an inner product of length n with its bias is off by at most
    gamma(n + 1) times the same product of absolute values, whatever the order of summation (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.1).

    Args:
        adapter: the adapter.
        modality: which of its modalities.
        x: shape ``(rows, d)``.
        dtype: of the graph's output.
    """
    u = _UNIT_ROUNDOFF["float32"]
    weights = {name: weight.astype(np.float64) for name, weight in adapter.weights.items()}
    down, up = weights[f"{modality}.down.weight"], weights[f"{modality}.up.weight"]
    rank, width = down.shape
    down_bias = weights.get(f"{modality}.down.bias", np.zeros(rank))
    up_bias = weights.get(f"{modality}.up.bias", np.zeros(width))
    name = adapter.config.activation
    hidden = x @ down.T + down_bias
    hidden_error = _gamma(width + 1) * (np.abs(x) @ np.abs(down).T + np.abs(down_bias))
    active = _ACTIVATIONS[name](hidden)
    roundoffs = 0 if name in ("identity", "relu") else _ACTIVATION_ROUNDOFFS
    active_error = _SLOPE.get(name, 1.0) * hidden_error + roundoffs * u * np.maximum(np.abs(hidden), 1.0)
    delta = active @ up.T + up_bias
    delta_error = active_error @ np.abs(up).T + _gamma(rank + 1) * (
        (np.abs(active) + active_error) @ np.abs(up).T + np.abs(up_bias)
    )
    result = x + delta
    error = delta_error + u * (np.abs(result) + delta_error)
    if dtype != "float32":
        error = error + _UNIT_ROUNDOFF[dtype] * (np.abs(result) + error)
    return result, error + _SMALLEST[dtype]


def _gamma(n: int) -> float:
    u = _UNIT_ROUNDOFF["float32"]
    return n * u / (1 - n * u)


def _gelu(h: Float64) -> Float64:
    erf = np.array([math.erf(value) for value in (h / math.sqrt(2.0)).ravel()]).reshape(h.shape)
    return 0.5 * h * (1.0 + erf)


_ACTIVATIONS: dict[str, Callable[[Float64], Float64]] = {
    "identity": lambda h: h,
    "relu": lambda h: np.maximum(h, 0.0),
    "gelu": _gelu,
    "gelu_tanh": lambda h: 0.5 * h * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * h**3))),
    "silu": lambda h: h / (1.0 + np.exp(-h)),
    "tanh": np.tanh,
}


def _run(
    session: ort.InferenceSession, embeds: npt.NDArray[np.float32], modality: npt.NDArray[np.int64] | None, dtype: str
) -> Float64:
    """Run the session on float32 values that are exact in ``dtype``.

    Buffers are bound as raw bits, since numpy itself has no bfloat16.
    """
    import ml_dtypes
    import onnxruntime as ort
    from onnx import TensorProto

    kinds = {
        "float32": (np.dtype(np.float32), TensorProto.FLOAT),
        "float16": (np.dtype(np.float16), TensorProto.FLOAT16),
        "bfloat16": (np.dtype(ml_dtypes.bfloat16), TensorProto.BFLOAT16),
    }
    kind, element = kinds[dtype]
    bits = np.dtype(f"u{kind.itemsize}")
    given, received = embeds.astype(kind), np.empty(embeds.shape, kind)
    binding = session.io_binding()
    value_of = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
    binding.bind_ortvalue_input("inputs_embeds", value_of(given.view(bits), element))
    if modality is not None:
        binding.bind_cpu_input("modality", modality)
    binding.bind_ortvalue_output(OUTPUT_NAME, value_of(received.view(bits), element))
    session.run_with_iobinding(binding)
    return received.astype(np.float64)
