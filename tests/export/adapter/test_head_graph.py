"""Graphs of heads: every kind and pooling, against the head that the runtime applies in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers.heads import LABELS, make_head
from helpers.runtime import random_adapter
from onnx import numpy_helper

from adalink.export.adapter.head_graph import build_head_graph, check_head_graph
from adalink.runtime import GraphError
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TOKENS
from adalink.runtime.storage.pooling_schema import POOLING_MODES
from adalink.runtime.tasks.head import head_of
from adalink.runtime.text_classifier import sigmoid, softmax

PLAIN = {"rank": 2, "activation": "gelu", "bias": True, "scope": "all"}


def adapter_with(kind: str, pooling: str = "mean") -> Adapter:
    return random_adapter("sha256:" + "0" * 64, 48, 3, **PLAIN, head=make_head(kind, pooling))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("kind", "pooling"), [(SINGLE_LABEL, mode) for mode in POOLING_MODES] + [(TOKENS, "")])
def test_scores_are_within_their_bound(kind: str, pooling: str, dtype: str) -> None:
    adapter = adapter_with(kind, pooling)
    graph = build_head_graph(adapter, "topics", dtype)
    assert check_head_graph(graph.SerializeToString(), adapter, dtype) < 0.5


@pytest.mark.parametrize("kind", LABELS)
def test_outputs_are_those_of_the_runtime(kind: str) -> None:
    adapter = adapter_with(kind)
    session = ort.InferenceSession(build_head_graph(adapter, "topics", "float32").SerializeToString())
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2, 7, 48)).astype(np.float32)
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3], np.int64)
    outputs = dict(
        zip(
            [output.name for output in session.get_outputs()],
            session.run(None, {"last_hidden_state": states, "attention_mask": mask}),
            strict=True,
        )
    )
    assert list(outputs) == (["scores"] if kind == REGRESSION else ["scores", "probabilities"])
    head = head_of(adapter)
    assert head is not None
    for row, length in enumerate((7, 4)):
        scores = head.scores(states[row, :length])
        received = outputs["scores"][row] if kind != TOKENS else outputs["scores"][row, :length]
        assert received == pytest.approx(scores, abs=1e-5)
        if kind != REGRESSION:
            shares = sigmoid(scores) if kind == MULTI_LABEL else softmax(scores)
            received = outputs["probabilities"][row]
            assert received[: len(shares)] == pytest.approx(shares, abs=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert LABELS[kind][0] in metadata["head"]
    assert metadata["adapter_digest"] == adapter.digest


def altered(model: onnx.ModelProto, name: str, change: Any) -> bytes:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (tensor,) = (tensor for tensor in copy.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    return copy.SerializeToString()


def test_planted_faults_are_found() -> None:
    adapter = adapter_with(SINGLE_LABEL)
    model = build_head_graph(adapter, "topics", "float32")
    for name, change in {
        "head.bias": lambda bias: bias[::-1],
        "head.weight": lambda weight: weight * np.float32(1.001),
    }.items():
        with pytest.raises(GraphError, match="times its bound"):
            check_head_graph(altered(model, name, change), adapter, "float32")
    for node in model.graph.node:
        if node.op_type == "Softmax":
            node.attribute[0].i = 0
    with pytest.raises(GraphError, match="a probability"):
        check_head_graph(model.SerializeToString(), adapter, "float32")
    for node in model.graph.node:
        if node.op_type == "Where":
            node.input[2] = node.input[1]  # padding counts
    with pytest.raises(GraphError, match="times its bound"):
        check_head_graph(model.SerializeToString(), adapter, "float32")
