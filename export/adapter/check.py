"""Checks of task graphs and bank graphs: each runs once before it is registered, against numpy float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adalink.export.adapter.error_bound import LARGEST, Float64, adapter_bound
from adalink.export.adapter.session import OpenGraph
from adalink.runtime.arrays import Array
from adalink.runtime.errors import AdapterError, GraphError
from adalink.runtime.storage.adapter import SOFT_PROMPT_NAME, TABLE_NAME, Adapter
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.safetensors import as_float32, as_stored
from adalink.runtime.tasks.adapter_mapping import bank_weights
from adalink.runtime.tasks.folding import ids_table


def check_task_graph(
    graph: OpenGraph, adapter: Adapter, dtype: str, embeds: npt.NDArray[np.float32], ids: Array | None = None
) -> None:
    """Run ``graph`` on ``embeds`` once for each modality and once without one.

    A soft prompt must come out in front of them, bit for bit.

    Args:
        graph: a task graph.
        adapter: what it was made from.
        dtype: the graph's dtype.
        embeds: shape ``(rows, d)``, exact in ``dtype``.
        ids: int64 ``(rows,)``, for an adapter that looks token ids up.

    Raises:
        GraphError: an element is outside the rounding bound, or a position without a modality was changed.
    """
    config = adapter.config
    soft_tokens, names = config.soft_tokens, config.modalities

    def run(other_inputs: dict[str, Array]) -> Float64:
        received = graph.run(embeds[None], {name: value[None] for name, value in other_inputs.items()}, soft_tokens)[0]
        soft = as_float32(as_stored(adapter.weights[SOFT_PROMPT_NAME], dtype)) if soft_tokens else embeds[:0]
        if not np.array_equal(received[:soft_tokens], soft):
            raise GraphError("task graph: the soft prompt is not what the adapter holds; expected it bit for bit")
        return np.asarray(received[soft_tokens:])

    if len(names) == 1 and config.rank:
        other_inputs = {} if ids is None or config.input != "ids" else {"input_ids": ids}
        _compare("task graph", run(other_inputs), adapter, names[0], dtype, embeds, ids)
        return
    for index in range(-1, len(names) if config.rank else 0):
        received = run({"modality": np.full(len(embeds), index, np.int64)} if config.rank else {})
        if index >= 0:
            _compare("task graph", received, adapter, names[index], dtype, embeds)
        elif not np.array_equal(received, embeds):
            raise GraphError("task graph: positions without a modality were changed; expected them bit for bit")


def check_in_bank(graph: OpenGraph, adapter: Adapter, dtype: str, embeds: npt.NDArray[np.float32]) -> None:
    """Run the bank graph of the adapter's activation key with its weights; as ``check_task_graph``."""
    for name in adapter.config.modalities:
        received = graph.run(embeds[None], bank_weights(adapter, name))[0]
        _compare("bank graph", received, adapter, name, dtype, embeds)


def check_ids_table(adapter: Adapter, table: EmbeddingTable, dtype: str, ids: Array) -> None:
    """Look ``ids`` up in the adapter's table as the runtime does, and compare as ``check_task_graph``."""
    received = ids_table(adapter).lookup(table, ids).astype(np.float64)
    _compare("table of token ids", received, adapter, "text", dtype, as_float32(table.take(ids)), ids)


def _compare(
    what: str,
    received: Float64,
    adapter: Adapter,
    modality: str,
    dtype: str,
    embeds: npt.NDArray[np.float32],
    ids: Array | None = None,
) -> None:
    if outside := find_outside_bound(received, adapter, modality, embeds.astype(np.float64), dtype, ids):
        raise GraphError(
            f"{what}, modality {modality!r}: element {outside.column} of row {outside.row} is {outside.difference}: "
            "the graph does not compute the adapter, so it was not registered; report this with the versions of onnx "
            "and onnxruntime"
        )


@dataclass(frozen=True)
class Outside:
    """The element furthest outside the rounding bound, and how it differs, in words."""

    row: int
    column: int
    difference: str


def find_outside_bound(
    received: Float64, adapter: Adapter, modality: str, x: Float64, dtype: str, ids: Array | None = None
) -> Outside | None:
    """Compare with the method in float64, element by element; arguments as of ``adapt_with_bound``.

    Raises:
        AdapterError: the exact result is more than ``dtype`` holds, so no graph can return it.
    """
    expected, bound = adapt_with_bound(adapter, modality, x, dtype, ids)
    if not (np.abs(expected) <= LARGEST[dtype]).all():
        raise AdapterError(
            f"adapter, modality {modality!r}: it makes embeddings of up to {np.abs(expected).max():.3g}, more than "
            f"{dtype} holds ({LARGEST[dtype]:.3g}), as which the base's are stored: train it again with a lower rate, "
            "or take a base of another dtype"
        )
    ratio = np.abs(received - expected) / bound
    if (ratio <= 1.0).all():
        return None
    row, column = (int(index) for index in np.unravel_index(np.argmax(ratio), ratio.shape))
    difference = f"{received[row, column]!r}, expected {expected[row, column]!r} within {bound[row, column]:.3g}"
    return Outside(row, column, difference)


def adapt_with_bound(
    adapter: Adapter, modality: str, x: Float64, dtype: str, ids: Array | None = None
) -> tuple[Float64, Float64]:
    """The method in numpy float64, and the componentwise bound of ``adalink.export.adapter.error_bound``.

    Args:
        adapter: the adapter.
        modality: which of its modalities.
        x: shape ``(rows, d)``, exact in ``dtype``.
        dtype: of the graph's output.
        ids: the tokens, int64 ``(rows,)``, of an adapter with ``input`` ``"ids"``.
    """
    weights = {name: weight.astype(np.float64) for name, weight in adapter.weights.items()}
    up = weights[f"{modality}.up.weight"]
    down_bias, up_bias = weights.get(f"{modality}.down.bias"), weights.get(f"{modality}.up.bias")
    activation = adapter.config.activation
    if adapter.config.input == "ids":
        # Looked up, not computed: nothing is rounded here, so the bound has no inner product.
        hidden, down = weights[TABLE_NAME][ids], np.zeros(up.T.shape)
    else:
        down = weights[f"{modality}.down.weight"]
        hidden = x @ down.T + (0.0 if down_bias is None else down_bias)
    activated = _ACTIVATIONS[activation](hidden)
    result = x + activated @ up.T + (0.0 if up_bias is None else up_bias)
    bound = adapter_bound(x, down, up, down_bias, up_bias, hidden, activated, activation=activation, dtype=dtype)
    return result, bound


def activate(activation: str, hidden: Float64) -> Float64:
    """An activation in float64."""
    return _ACTIVATIONS[activation](hidden)


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
