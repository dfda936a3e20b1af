"""Shared adapter graph on ONNX Runtime: adapters of one activation and bias, their weights passed as views."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from adalink.runtime.arrays import Array
from adalink.runtime.engine import SharedAdapterGraph
from adalink.runtime.errors import GraphError
from adalink.runtime.implements import implements
from adalink.runtime.ort.errors import ORT_TYPES, onnxruntime_errors, refusal, wrong_name
from adalink.runtime.storage.manifest import Base

if TYPE_CHECKING:
    import onnxruntime as ort

_WEIGHTS = {"down", "up"}
_BIASES = {"down_bias", "up_bias"}
_OUTPUTS = ["adapted_embeds"]


class OnnxSharedAdapterGraph:
    """One session for all adapters of one activation and bias; switching tasks means passing other weights."""

    def __init__(self, session: ort.InferenceSession, runtime: ModuleType, base: Base) -> None:
        self._run = session.run
        self._ort = runtime
        inputs = {node.name: node for node in session.get_inputs()}
        expected_inputs = {"inputs_embeds"} | _WEIGHTS | (_BIASES if inputs.keys() & _BIASES else set())
        if inputs.keys() != expected_inputs:
            name = sorted(inputs.keys() ^ expected_inputs)[0]
            raise GraphError(wrong_name("shared adapter graph", "input", name, sorted(inputs)))
        outputs = [node.name for node in session.get_outputs()]
        if outputs != _OUTPUTS:
            raise GraphError(wrong_name("shared adapter graph", "output", _OUTPUTS[0], outputs))
        node, expected = inputs["inputs_embeds"], ORT_TYPES[base.embedding_dtype]
        if node.type != expected or node.shape[-1] != base.hidden_size:
            raise GraphError(
                f"shared adapter graph: inputs_embeds is {node.type} of width {node.shape[-1]}, the base takes "
                f"{expected} of width {base.hidden_size}: export the base again"
            )

    @implements(SharedAdapterGraph)
    def run(self, inputs_embeds: Array, weights: Mapping[str, Array]) -> Array:
        try:
            result: Array = self._run(_OUTPUTS, {"inputs_embeds": inputs_embeds, **weights})[0]
        except onnxruntime_errors(self._ort) as error:
            raise refusal("shared adapter graph", error) from error
        return result
