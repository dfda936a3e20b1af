"""Compressed adapters: the bottleneck's dimensions ordered by what they do, the last cut off, the rest in fewer bits.

Without activation a bottleneck is one linear map, ``up @ down``, and any other basis of it is the same task. The basis
chosen here is that of a singular value decomposition weighted by the embeddings that the map meets: the first ``k``
dimensions are the best map of rank ``k`` for them, in the sense of least squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.adapter import Adapter, Weights, make_adapter
from adalink.runtime.storage.compressed_weights import by_dimension, is_compressed
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.quantized_rows import round_rows
from adalink.runtime.storage.safetensors import as_float32
from adalink.runtime.tasks.nested import first_dimensions

Float64 = npt.NDArray[np.float64]

_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Compressed:
    """A compressed adapter.

    Attributes:
        adapter: it.
        energy: of the map on text, the share of the squared change of embeddings that each number of dimensions keeps,
            float64 ``(r,)``; empty for an adapter that was not ordered.
    """

    adapter: Adapter
    energy: Float64


def second_moment(
    table: EmbeddingTable,
    counts: npt.NDArray[np.int64] | None = None,
    progress: Callable[[str, float | None], None] = lambda text, share: None,
) -> Float64:
    """The second moment of a vocabulary's embeddings, ``sum(n * x @ x.T) / sum(n)``: float64 ``(d, d)``.

    Args:
        table: the base's embedding table, of ``V`` rows.
        counts: how often each token occurs, int64 ``(V,)``; each once by default.
        progress: called with what is done, and the share of it.
    """
    width = table.shape[1]
    total: Float64 = np.zeros((width, width))
    for first in range(0, len(table), _ROWS_AT_ONCE):
        progress("embeddings of the vocabulary", first / len(table))
        last = min(first + _ROWS_AT_ONCE, len(table))
        rows = as_float32(table.block(first, last)).astype(np.float64)
        weighted = rows if counts is None else rows * counts[first:last, None]
        total += weighted.T @ rows
    moment: Float64 = total / (len(table) if counts is None else max(1, int(counts.sum())))
    return moment


def compress_adapter(
    adapter: Adapter, moment: Float64, *, rank: int | None = None, energy: float | None = None, weight_dtype: str
) -> Compressed:
    """Order, cut and round an adapter.

    Args:
        adapter: an adapter with a bottleneck.
        moment: of the embeddings of text, float64 ``(d, d)``. Other modalities are weighted equally in all directions.
        rank: dimensions to keep of each modality; those that there are by default.
        energy: instead, the share of the squared change of text embeddings to keep, over 0 up to 1.
        weight_dtype: how ``down`` and ``up`` are stored, one of ``WEIGHT_BITS``.

    Raises:
        ConfigError: the adapter has no bottleneck, or one with an activation, of which no dimension can be cut.
    """
    config = adapter.config
    if config.rank == 0 or config.input == "ids":
        what = "a table of token ids" if config.input == "ids" else "no bottleneck"
        raise ConfigError(f"the adapter has {what}: only down and up of a bottleneck are compressed")
    if config.activation != "identity":
        if rank is not None or energy is not None:
            raise ConfigError(
                f"the adapter has activation {config.activation!r}: its dimensions cannot be put in another order; "
                "leave --rank and --energy out, so that its numbers alone are stored in fewer bits"
            )
        return Compressed(_round(adapter, weight_dtype), np.zeros(0))
    weights, energies, widths = dict(adapter.weights), np.zeros(0), {}
    for modality in config.modalities:
        is_text = modality == "text"
        changed, shares = _order(adapter, modality, moment if is_text else np.eye(config.hidden_size))
        energies = shares if is_text else energies
        widths[modality] = _width(shares, rank, energy)
        weights |= changed
    ordered = make_adapter(replace(config, nested=True), weights, "compressed adapter")
    return Compressed(_round(first_dimensions(ordered, widths), weight_dtype), energies)


def _width(shares: Float64, rank: int | None, energy: float | None) -> int:
    if energy is not None:
        return min(len(shares), int(np.searchsorted(shares, energy * (1 - 1e-12))) + 1)
    return len(shares) if rank is None else min(rank, len(shares))


def _order(adapter: Adapter, modality: str, moment: Float64) -> tuple[Weights, Float64]:
    """Weights of the same map in the new basis, and the share of the energy that the first dimensions keep."""
    weights = {name: weight.astype(np.float64) for name, weight in adapter.weights.items()}
    down, up = weights[f"{modality}.down.weight"], weights[f"{modality}.up.weight"]
    values, vectors = np.linalg.eigh(moment)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    basis, corner = np.linalg.qr(up)
    left, singular, _ = np.linalg.svd(corner @ down @ root, full_matrices=False)
    new_up, new_down = basis @ left, left.T @ corner @ down
    # Both sides of a dimension get the same length, so that neither is rounded or overflows.
    lengths = np.linalg.norm(new_down, axis=1)
    balance = np.sqrt(np.where(lengths > 0, lengths, 1.0))
    ordered = {f"{modality}.up.weight": new_up * balance, f"{modality}.down.weight": new_down / balance[:, None]}
    if adapter.config.bias:
        constant = up @ weights[f"{modality}.down.bias"] + weights[f"{modality}.up.bias"]
        ordered |= {f"{modality}.down.bias": np.zeros(len(down)), f"{modality}.up.bias": constant}
    squares = np.cumsum(singular**2)
    shares = squares / squares[-1] if squares[-1] > 0 else np.ones(len(squares))
    return {name: weight.astype(np.float32) for name, weight in ordered.items()}, shares


def _round(adapter: Adapter, weight_dtype: str) -> Adapter:
    if weight_dtype == "float32":
        return adapter
    rounded = {
        name: _round_matrix(name, weight, weight_dtype) if is_compressed(name) else weight
        for name, weight in adapter.weights.items()
    }
    return make_adapter(replace(adapter.config, weight_dtype=weight_dtype), rounded, "compressed adapter")


def _round_matrix(name: str, weight: npt.NDArray[np.float32], weight_dtype: str) -> npt.NDArray[np.float32]:
    return by_dimension(name, round_rows(np.ascontiguousarray(by_dimension(name, weight)), weight_dtype))
