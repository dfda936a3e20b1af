"""A task graph is run once before it is registered, against the method in numpy float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adalink.export.bounds import Float64, adapter_bound
from adalink.export.task_graph import OUTPUT_NAME
from adalink.runtime.adapter import Adapter
from adalink.runtime.errors import GraphError

if TYPE_CHECKING:
    import onnxruntime as ort


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
    """The method in numpy float64, and the componentwise bound of ``adalink.export.bounds``.

    Args:
        adapter: the adapter.
        modality: which of its modalities.
        x: shape ``(rows, d)``, exact in ``dtype``.
        dtype: of the graph's output.
    """
    weights = {name: weight.astype(np.float64) for name, weight in adapter.weights.items()}
    down, up = weights[f"{modality}.down.weight"], weights[f"{modality}.up.weight"]
    down_bias, up_bias = weights.get(f"{modality}.down.bias"), weights.get(f"{modality}.up.bias")
    activation = adapter.config.activation
    hidden = x @ down.T + (0.0 if down_bias is None else down_bias)
    activated = _ACTIVATIONS[activation](hidden)
    result = x + activated @ up.T + (0.0 if up_bias is None else up_bias)
    bound = adapter_bound(x, down, up, down_bias, up_bias, hidden, activated, activation=activation, dtype=dtype)
    return result, bound


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
