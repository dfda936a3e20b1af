"""The graph of an onnxruntime-genai folder behind the base's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adalink.export.adapter.nodes import edge_type, finish_model
from adalink.runtime.storage.manifest import Base

if TYPE_CHECKING:
    import onnx

# Output name that the config joins; the base's own graph says the input's.
SCORES = "scores"


def build_head(base: Base) -> onnx.ModelProto:
    """Build the graph of the last stage: onnxruntime-genai expects logits of every position, and reads the last ones.

    Inputs: ``logits`` ``(1, vocab)`` and ``input_ids`` int64 ``(1, sequence)``. Output: ``scores``, the logits repeated
    to ``(1, sequence, vocab)``.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    dtype, vocab = edge_type(base.embedding_dtype), base.vocab_size
    nodes = [
        helper.make_node("Shape", ["input_ids"], ["length"], start=1, end=2),
        helper.make_node("Concat", ["one", "length", "one"], ["repeats"], axis=0),
        helper.make_node("Unsqueeze", ["logits", "first"], ["row"]),
        helper.make_node("Expand", ["row", "repeats"], [SCORES]),
    ]
    graph = helper.make_graph(
        nodes,
        "adalink_genai_head",
        [
            helper.make_tensor_value_info("logits", dtype, [1, vocab]),
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "sequence"]),
        ],
        [helper.make_tensor_value_info(SCORES, dtype, [1, "sequence", vocab])],
        [numpy_helper.from_array(np.array([value], np.int64), name) for name, value in (("one", 1), ("first", 0))],
    )
    return finish_model(graph, {"genai": "head"})
