"""Bytes of a damaged graph in ONNX Runtime's names and messages are refused, and are no ``UnicodeDecodeError``."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from adalink.export.adapter.session import OpenGraph
from adalink.runtime.errors import BackendError
from adalink.runtime.ort.errors import guard
from adalink.runtime.ort.open_session import open_session

# What is spoilt in the graph below.
DAMAGED = {
    "input": b"abcd",
    "output": b"yyyy",
    "dimension": b"nnnn",
    "key of the metadata": b"keyy",
    "value of the metadata": b"vall",
    "operator": b"Add",
}


@pytest.fixture(scope="module")
def graph() -> bytes:
    """``yyyy = abcd + wwww``."""
    names = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["nnnn"]) for name in ("abcd", "yyyy")]
    weights = [numpy_helper.from_array(np.ones(1, np.float32), "wwww")]
    node = helper.make_node("Add", ["abcd", "wwww"], ["yyyy"])
    model = helper.make_model(
        helper.make_graph([node], "g", names[:1], names[1:], weights),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    helper.set_model_props(model, {"keyy": "vall"})
    data: bytes = model.SerializeToString()
    return data


def spoil(graph: bytes, name: bytes) -> bytes:
    assert name in graph
    return graph.replace(name, name[:1] + b"\xff" + name[2:])


def test_a_whole_graph_opens(graph: bytes) -> None:
    session = open_session(ort, "here", graph, ort.SessionOptions())
    (result,) = session.run(None, {"abcd": np.zeros(2, np.float32)})
    assert result.tolist() == [1, 1]


@pytest.mark.parametrize("name", DAMAGED)
def test_names_that_are_not_utf8_are_refused(graph: bytes, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    spoilt = spoil(graph, DAMAGED[name])
    with pytest.raises(BackendError, match=r"^here: ONNX Runtime says what is not UTF-8: '.*\\xff.*'"):
        open_session(ort, "here", spoilt, options)
    assert capfd.readouterr().out == "", "nothing but the kit's own words on the standard output"
    with pytest.raises(BackendError, match="graph: ONNX Runtime says what is not UTF-8"):
        OpenGraph(spoilt, "float32")


def test_a_refusal_in_bytes_is_mapped() -> None:
    def refuse() -> None:
        b"no such \xffoperator\nsecond line".decode()

    with pytest.raises(BackendError, match=r"^here: ONNX Runtime says what is not UTF-8: 'no such \\\\xffoperator'"):
        guard(ort, "here", refuse)
