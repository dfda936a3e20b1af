"""Head graphs: the head of a task as a self-contained ONNX graph, for hosts that have no NumPy behind the engine.

Inputs: ``last_hidden_state`` of the text's own tokens, ``(batch, sequence, d)`` in the base's dtype, without the
positions of a soft prompt, and ``attention_mask``, int64 ``(batch, sequence)``, with padding on the right. Outputs:
``scores``, float32 ``(batch, labels)``, or ``(batch, sequence, labels)`` of tokens, and ``probabilities`` of the same
shape unless the task is a regression. The labels are in the graph's metadata, as JSON.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adalink.export.adapter.error_bound import UNIT_ROUNDOFF, Float64, worst_ratio
from adalink.export.adapter.nodes import edge_type, finish_model
from adalink.runtime.arrays import Array
from adalink.runtime.errors import GraphError
from adalink.runtime.ort.errors import guard
from adalink.runtime.ort.open_session import open_session
from adalink.runtime.pooling import pool
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.adapter_spec import show_setting
from adalink.runtime.storage.head_spec import HEAD_BIAS, HEAD_WEIGHT, MULTI_LABEL, REGRESSION, Head
from adalink.runtime.storage.safetensors import as_float32, as_stored

if TYPE_CHECKING:
    import onnx

STATES_NAME, MASK_NAME = "last_hidden_state", "attention_mask"
SCORES_NAME, PROBABILITIES_NAME = "scores", "probabilities"
# Tokens of the texts that a new graph is run on.
_CHECKED_LENGTHS = (1, 5, 12)
_BELOW_ALL = -3e38


def build_head_graph(adapter: Adapter, task: str, dtype: str) -> onnx.ModelProto:
    """Build and check the graph of an adapter's head.

    Args:
        adapter: a checked adapter with a head.
        task: the name it is deployed under.
        dtype: of ``last_hidden_state``.
    """
    from onnx import TensorProto, helper, numpy_helper

    head = adapter.config.head
    assert head is not None
    places: list[str | int | None] = ["batch", "sequence"]
    rows: list[str | int | None] = [places[0], len(head.labels)] if head.pooling else [*places, len(head.labels)]
    nodes = [] if dtype == "float32" else [helper.make_node("Cast", [STATES_NAME], ["x"], to=TensorProto.FLOAT)]
    pooling, features = _pooling_nodes(head.pooling, STATES_NAME if dtype == "float32" else "x")
    nodes += [*pooling, helper.make_node("MatMul", [features, HEAD_WEIGHT], ["products"])]
    nodes.append(helper.make_node("Add", ["products", HEAD_BIAS], [SCORES_NAME]))
    outputs = [helper.make_tensor_value_info(SCORES_NAME, TensorProto.FLOAT, rows)]
    if head.problem_type != REGRESSION:
        if head.problem_type == MULTI_LABEL:
            nodes.append(helper.make_node("Sigmoid", [SCORES_NAME], [PROBABILITIES_NAME]))
        else:
            nodes.append(helper.make_node("Softmax", [SCORES_NAME], [PROBABILITIES_NAME], axis=-1))
        outputs.append(helper.make_tensor_value_info(PROBABILITIES_NAME, TensorProto.FLOAT, rows))
    constants: dict[str, Array] = {
        HEAD_WEIGHT: np.ascontiguousarray(adapter.weights[HEAD_WEIGHT].T),
        HEAD_BIAS: adapter.weights[HEAD_BIAS],
        "sequence_axis": np.array([1], np.int64),
        "last_axis": np.array([2], np.int64),
        "first": np.array([0], np.int64),
        "zero": np.array(0, np.float32),
        "below_all": np.array(_BELOW_ALL, np.float32),
    }
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        name="adalink_head",
        inputs=[
            helper.make_tensor_value_info(STATES_NAME, edge_type(dtype), [*places, adapter.config.hidden_size]),
            helper.make_tensor_value_info(MASK_NAME, TensorProto.INT64, places),
        ],
        outputs=outputs,
        initializer=[numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    return finish_model(graph, {"task": task, "head": show_setting(head), "adapter_digest": adapter.digest})


def _pooling_nodes(mode: str, states: str) -> tuple[list[onnx.NodeProto], str]:
    """Nodes of a pooling over float32 states, and the name of what they give."""
    from onnx import TensorProto, helper

    if not mode:
        return [], states
    if mode == "cls":
        gathered = helper.make_node("Gather", [states, "first"], ["row"], axis=1)
        return [gathered, helper.make_node("Squeeze", ["row", "sequence_axis"], ["pooled"])], "pooled"
    nodes = [
        helper.make_node("Unsqueeze", [MASK_NAME, "last_axis"], ["wide_mask"]),
        helper.make_node("Cast", ["wide_mask"], ["is_token"], to=TensorProto.BOOL),
        # Whatever padding holds, NaN included, counts for nothing.
        helper.make_node("Where", ["is_token", states, "below_all" if mode == "max" else "zero"], ["tokens"]),
    ]
    if mode == "max":
        return [*nodes, helper.make_node("ReduceMax", ["tokens", "sequence_axis"], ["pooled"], keepdims=0)], "pooled"
    nodes.append(helper.make_node("Cast", ["wide_mask"], ["mask"], to=TensorProto.FLOAT))
    weights = "mask"
    if mode in ("weightedmean", "lasttoken"):
        nodes.append(helper.make_node("CumSum", ["mask", "axis_of_sum"], ["places"]))
        nodes.insert(0, helper.make_node("Squeeze", ["sequence_axis"], ["axis_of_sum"]))
        weights = "weights"
    if mode == "weightedmean":
        nodes.append(helper.make_node("Mul", ["places", "mask"], ["weights"]))
    elif mode == "lasttoken":
        nodes += [
            helper.make_node("ReduceSum", ["mask", "sequence_axis"], ["count"], keepdims=1),
            helper.make_node("Equal", ["places", "count"], ["is_last_or_behind"]),
            helper.make_node("And", ["is_last_or_behind", "is_token"], ["is_last"]),
            helper.make_node("Cast", ["is_last"], ["weights"], to=TensorProto.FLOAT),
        ]
    nodes += [
        helper.make_node("Mul", ["tokens", weights], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "sequence_axis"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", [weights, "sequence_axis"], ["total"], keepdims=0),
    ]
    divisor = "total"
    if mode == "mean_sqrt_len_tokens":
        nodes.append(helper.make_node("Sqrt", ["total"], ["root"]))
        divisor = "root"
    return [*nodes, helper.make_node("Div", ["sum", divisor], ["pooled"])], "pooled"


def check_head_graph(graph: bytes, adapter: Adapter, dtype: str) -> float:
    """Run a head graph on seeded states of several lengths in one batch, with NaN where there is padding.

    Args:
        graph: the graph.
        adapter: what it was made from.
        dtype: of its input.

    Returns:
        Largest deviation from float64 in bounds, at most 1.

    Raises:
        GraphError: a score is further off, or a probability is not that of its score.
    """
    head, width = adapter.config.head, adapter.config.hidden_size
    assert head is not None
    rng = np.random.default_rng([20231012, width])
    states = as_float32(as_stored(rng.normal(size=(3, max(_CHECKED_LENGTHS), width)).astype(np.float32), dtype))
    mask = np.zeros(states.shape[:2], np.int64)
    for row, length in enumerate(_CHECKED_LENGTHS):
        mask[row, :length] = 1
    padded = np.where(mask[..., None] == 1, states, np.nan).astype(np.float32)
    scores, probabilities = _run(graph, as_stored(padded, dtype), mask, dtype)
    worst = 0.0
    for row, length in enumerate(_CHECKED_LENGTHS):
        exact, bound = _exact_scores(head, adapter, states[row, :length])
        received = scores[row] if head.pooling else scores[row, :length]
        worst = max(worst, worst_ratio(received, exact, bound))
        if worst > 1.0:
            raise GraphError(f"head graph: a score is {worst:.3g} times its bound from that of the adapter's head")
        if probabilities is not None:
            shares = probabilities[row] if head.pooling else probabilities[row, :length]
            powers = np.exp(exact - exact.max(axis=-1, keepdims=True))
            is_multi = head.problem_type == MULTI_LABEL
            expected = 1 / (1 + np.exp(-exact)) if is_multi else powers / powers.sum(axis=-1, keepdims=True)
            if not np.abs(shares - expected).max() <= bound.max() + 1e-5:
                raise GraphError("head graph: a probability is not that of its score")
    return worst


def _run(graph: bytes, states: Array, mask: Array, dtype: str) -> tuple[Array, Array | None]:
    """Scores and probabilities of a graph; bfloat16 goes in as its bits."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = open_session(ort, "head graph", graph, options)
    binding = session.io_binding()
    typed = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
        states if dtype == "float32" else states.view(np.uint16), edge_type(dtype)
    )
    binding.bind_ortvalue_input(STATES_NAME, typed)
    binding.bind_cpu_input(MASK_NAME, mask)
    names = [output.name for output in session.get_outputs()]
    for name in names:
        binding.bind_output(name)
    guard(ort, "head graph", lambda: session.run_with_iobinding(binding))
    values = dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))
    return values[SCORES_NAME], values.get(PROBABILITIES_NAME)


def _exact_scores(head: Head, adapter: Adapter, states: Array) -> tuple[Float64, Float64]:
    """Scores of one text in float64, and the largest error of each of a correct graph."""
    weight, bias = adapter.weights[HEAD_WEIGHT].astype(np.float64), adapter.weights[HEAD_BIAS].astype(np.float64)
    features = pool(states, [head.pooling]).astype(np.float64) if head.pooling else states.astype(np.float64)
    size = np.abs(pool(np.abs(states), [head.pooling])).astype(np.float64) if head.pooling else np.abs(features)
    if head.pooling == "max":
        size = np.abs(states).max(axis=0).astype(np.float64)
    steps = len(states) + states.shape[1] + 8
    bound = steps * UNIT_ROUNDOFF["float32"] * (size @ np.abs(weight).T + np.abs(bias)) + 1e-30
    return features @ weight.T + bias, bound
