"""Check of the graph before a base: it gives the embeddings of the base and of every task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from adalink.export.adapter.check import find_outside_bound
from adalink.export.pipeline.tasks import task_tensors
from adalink.export.table_file import blocks_of_rows
from adalink.runtime.arrays import Array
from adalink.runtime.errors import GraphError
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.safetensors import as_float32

_PIECE_BYTES = 32 << 20

Progress = Callable[[str, float | None], None]


def check_front(
    path: Path,
    table: EmbeddingTable,
    adapters: Mapping[str, Adapter],
    activations: tuple[str, ...],
    progress: Progress,
) -> None:
    """Run the graph for every token of the vocabulary, with no task and with each.

    Args:
        path: the graph.
        table: the deployment's table.
        adapters: the tasks.
        activations: those that the graph computes.
        progress: called with a line, and how far it is from 0 to 1.

    Raises:
        GraphError: without a task an embedding is not that of the table bit for bit, or with one it is outside the
            bound of the method in float64.
    """
    import onnxruntime as ort

    tokens, width = table.shape
    dtype = str(table.dtype)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    blocks = list(blocks_of_rows(tokens, max(1, _PIECE_BYTES // (8 * width))))
    for number, (task, adapter) in enumerate({"the base": None, **adapters}.items()):
        weights = task_tensors(adapter, activations, width)
        for first, last in blocks:
            progress(f"checking {task}: {first} of {tokens} tokens", (number + first / tokens) / (len(adapters) + 1))
            ids = np.arange(first, last)[None]
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **weights}
            received = session.run(["inputs_embeds"], feeds)[0][0]
            fault = _find_fault(received, table.block(first, last), adapter, dtype, first)
            if fault is not None:
                raise GraphError(
                    f"{task} in {path.name}: {fault}. Nothing was written; report this with the "
                    "versions of onnx and onnxruntime"
                )


def _find_fault(received: Array, embeds: Array, adapter: Adapter | None, dtype: str, first: int) -> str | None:
    """What is wrong with the embeddings that the graph gave of tokens from ``first`` on; ``None`` if nothing is."""
    if adapter is None:
        return None if np.array_equal(received, embeds) else "not the embedding of the deployment"
    exact = as_float32(embeds).astype(np.float64)
    found = find_outside_bound(received.astype(np.float64), adapter, "text", exact, dtype)
    if found is None:
        return None
    return f"element {found.column} of token {first + found.row} is {found.difference}"
