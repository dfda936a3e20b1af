"""Engine graphs: the portable base graph, edited for logits at chosen positions and a KV cache in place.

The edited graph is in memory only. Weights stay in the file beside the portable graph, and the parser reads them there.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from adalink.runtime.errors import ConfigError, GraphError
from adalink.runtime.storage.manifest import Base

if TYPE_CHECKING:
    import onnx

# The opset with TensorScatter, and the first IR version that goes with it.
IN_PLACE_OPSET = 24
_IN_PLACE_IR = 12
_PREFIX = "engine/"
_CACHE_AXIS = 2
# Operators allowed after the last product: element by element, with constants of one axis at most.
_TAIL = ("Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity")
_PRODUCTS = ("MatMul",)


def engine_graph(path: Path, base: Base, capacity: int | None) -> onnx.ModelProto:
    """The graph to build an engine from.

    An encoder's is the portable graph. A decoder's has another input, ``logits_at`` int64 ``(places,)``: flat indices
    into ``batch * sequence``; ``logits`` has the shape ``(places, vocab)``. With a ``capacity`` the cache is written
    in place: ``past_key_values.*`` and ``present.*`` have the shape ``(batch, kv_heads, capacity, head_dim)`` and may
    be the same memory; ``write_indices`` int64 ``(batch,)``, the same number for all rows, is where the new
    positions go; the length of ``attention_mask`` ``(batch, total)`` is how many positions of the cache are attended
    to, at least ``write_indices[0] + sequence``. Positions behind those are not attended to, but must be finite.

    Args:
        path: the portable base graph; its weights file is not read.
        base: the base contract.
        capacity: positions of the cache; ``None`` for one that grows, as in the portable graph.

    Raises:
        ConfigError: the base is an encoder-decoder.
        GraphError: the graph is not as the kit exports portable ones; the message names the difference.
    """
    import onnx

    check_buildable(base)
    model = onnx.load(str(path), load_external_data=False)
    if base.kind == "encoder":
        return model
    edit = _Edit(model, path.name)
    edit.gather_logits()
    if capacity is not None:
        edit.keep_cache_in_place(capacity)
    edit.finish()
    return model


def check_buildable(base: Base) -> None:
    """Check that engines can be built of a base; raises ``ConfigError``."""
    if base.kind == "encoder-decoder":
        raise ConfigError(
            f"base {base.name!r} is an encoder-decoder: engines are built for decoders and encoders only; run it with "
            "--backend onnxruntime-cpu"
        )
    if base.vision is not None and base.vision.patches is not None:
        raise ConfigError(
            f"positions of base {base.name!r} follow the grid of an image, which engines do not take: run it with "
            "--backend onnxruntime-cpu"
        )


class _Edit:
    """A graph that is being edited, with the producer and the consumers of each value."""

    def __init__(self, model: onnx.ModelProto, name: str) -> None:
        self._model = model
        self._graph = model.graph
        self._name = name
        self._producers: dict[str, onnx.NodeProto] = {
            output: node for node in self._graph.node for output in node.output
        }
        self._consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self._graph.node:
            for value in node.input:
                self._consumers[value].append(node)
        self._inputs = {value.name: value for value in self._graph.input}
        self._outputs = {value.name: value for value in self._graph.output}
        self._weights = {tensor.name: tensor for tensor in self._graph.initializer}
        # Replacements of nodes, by the name of their first output; and nodes to prepend to the graph.
        self._replacements: dict[str, list[onnx.NodeProto]] = {}
        self._prepended: list[onnx.NodeProto] = []

    def gather_logits(self) -> None:
        """Compute logits at ``logits_at`` only: the head is the largest product of a small model."""
        from onnx import TensorProto, helper

        head = self._head()
        hidden = head.input[0]
        flat, chosen = f"{_PREFIX}hidden_flat", f"{_PREFIX}hidden_at"
        width = self._constant("flat_shape", [-1, self._rows_of(head.input[1])])
        self._replacements[head.output[0]] = [
            helper.make_node("Reshape", [hidden, width], [flat]),
            helper.make_node("Gather", [flat, "logits_at"], [chosen], axis=0),
            head,
        ]
        head.input[0] = chosen
        self._graph.input.append(helper.make_tensor_value_info("logits_at", TensorProto.INT64, ["places"]))
        logits = self._outputs["logits"]
        vocab = logits.type.tensor_type.shape.dim[-1].dim_value
        self._graph.output.remove(logits)
        changed = helper.make_tensor_value_info("logits", logits.type.tensor_type.elem_type, ["places", vocab])
        self._graph.output.insert(0, changed)

    def keep_cache_in_place(self, capacity: int) -> None:
        """Write new positions into the input cache, and attend to its first ``total`` positions."""
        from onnx import TensorProto, helper

        pairs = [(name, self._joined(name)) for name in self._inputs if name.startswith("past_key_values.")]
        if not pairs:
            raise self._objection("no input past_key_values.*", "a decoder's cache")
        length = self._past_length()
        zero, axis = self._constant("zero", [0]), self._constant("cache_axis", [_CACHE_AXIS])
        first, begin, total = self._constant("first", 0), f"{_PREFIX}begin", f"{_PREFIX}total"
        self._prepended += [
            helper.make_node("Gather", ["write_indices", first], [begin], axis=0),
            helper.make_node("Shape", ["attention_mask"], [total], start=1, end=2),
        ]
        self._redirect(length, begin)
        self._replacements[length] = []
        for name, node in pairs:
            present, new = node.output[0], node.input[1]
            if not self._consumers[present]:
                raise self._objection(f"nothing that reads {present}", "attention over the cache")
            visible = f"{_PREFIX}seen.{present}"
            self._redirect(present, visible)
            scatter_inputs = [name, new, "write_indices"]
            self._replacements[present] = [
                helper.make_node("TensorScatter", scatter_inputs, [present], axis=_CACHE_AXIS, mode="linear"),
                helper.make_node("Slice", [present, zero, total, axis], [visible]),
            ]
            self._set_length(self._inputs[name], capacity)
            self._set_length(self._outputs[present], capacity)
        self._graph.input.append(helper.make_tensor_value_info("write_indices", TensorProto.INT64, ["batch"]))
        (standard,) = (entry for entry in self._model.opset_import if entry.domain in ("", "ai.onnx"))
        standard.version = IN_PLACE_OPSET
        self._model.ir_version = max(self._model.ir_version, _IN_PLACE_IR)

    def finish(self) -> None:
        """Replace the old nodes by the new ones, and check the graph."""
        import onnx

        nodes = [new for node in self._graph.node for new in self._replacements.get(node.output[0], [node])]
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*self._prepended, *nodes)]
        del self._graph.node[:]
        self._graph.node.extend(kept)
        del self._graph.value_info[:]
        try:
            inferred = onnx.shape_inference.infer_shapes(self._model, strict_mode=True, check_type=True)
        except onnx.shape_inference.InferenceError as error:
            raise GraphError(f"{self._name}: the engine's graph is inconsistent: {error}") from error
        for tensor in inferred.graph.initializer:  # the checker would look for their file
            if tensor.external_data:
                tensor.ClearField("external_data")
                tensor.data_location = onnx.TensorProto.DEFAULT
                tensor.dims[:] = [0]
        try:
            onnx.checker.check_model(inferred)
        except onnx.checker.ValidationError as error:
            raise GraphError(f"{self._name}: the engine's graph is not valid: {error}") from error

    def _head(self) -> onnx.NodeProto:
        """The head: the last product, whatever scales or caps its logits."""
        if "logits" not in self._outputs:
            raise self._objection(f"outputs {', '.join(list(self._outputs)[:3])}", "an output logits")
        value, tail = "logits", []
        while (node := self._producers.get(value)) is not None:
            if node.op_type in _PRODUCTS:
                if self._is_constant(node.input[1]):
                    return node
                break
            inner = [name for name in node.input if not self._is_constant(name)]
            wide = [name for name in node.input if self._is_constant(name) and len(self._shape_of(name)) > 1]
            if node.op_type not in _TAIL or len(inner) != 1 or wide:
                break
            tail.append(node.op_type)
            (value,) = inner
        origin = " after ".join(filter(None, [node.op_type if node else f"input {value}", ", ".join(tail)]))
        raise self._objection(f"logits made by {origin}", "one MatMul with constant weights, and scales after it")

    def _joined(self, past: str) -> onnx.NodeProto:
        """The one node that reads ``past``: the concatenation with the new positions, which is ``present``."""
        readers = self._consumers[past]
        if len(readers) == 1 and readers[0].op_type == "Concat" and len(readers[0].input) == 2:
            node = readers[0]
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), None)
            present = past.replace("past_key_values.", "present.")
            if axis in (_CACHE_AXIS, _CACHE_AXIS - 4) and node.input[0] == past and node.output[0] == present:
                return node
        consumers = ", ".join(f"{node.op_type} to {node.output[0]}" for node in readers) or "nothing"
        raise self._objection(f"{past} read by {consumers}", "one Concat of it and the new positions to present.*")

    def _past_length(self) -> str:
        """Name of the past's length: the mask's length less the new positions."""
        total, sequence = self._lengths("attention_mask"), self._lengths("inputs_embeds")
        differences = [
            node
            for node in self._graph.node
            if node.op_type == "Sub" and node.input[0] in total and node.input[1] in sequence
        ]
        others = {node.op_type for value in total for node in self._consumers[value]} - {"Sub", "Cast"}
        if len(differences) != 1 or others:
            what = f"{len(differences)} differences of the lengths of attention_mask and inputs_embeds"
            what += f", and the mask's length read by {', '.join(sorted(others))}" if others else ""
            raise self._objection(what, "one difference, which the causal mask begins at")
        return str(differences[0].output[0])

    def _lengths(self, name: str) -> set[str]:
        """Names of the values that hold the second dimension of an input."""
        gathers = [
            node
            for shape in self._consumers[name]
            if shape.op_type == "Shape"
            for node in self._consumers[shape.output[0]]
            if node.op_type == "Gather" and self._integer(node.input[1]) == 1
        ]
        return {node.output[0] for node in gathers}

    def _integer(self, name: str) -> int | None:
        import onnx

        node = self._producers.get(name)
        tensor = self._weights.get(name)
        if node is not None and node.op_type == "Constant":
            tensor = next((entry.t for entry in node.attribute if entry.name == "value"), None)
        if tensor is None or tensor.external_data:
            return None
        value = onnx.numpy_helper.to_array(tensor)
        return int(value) if value.size == 1 else None

    def _is_constant(self, name: str) -> bool:
        """Whether a value depends on no input."""
        if name in self._inputs:
            return False
        node = self._producers.get(name)
        return node is None or all(self._is_constant(entry) for entry in node.input)

    def _shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a constant that is an initializer, a ``Constant``, or one of those transposed or cast."""
        node = self._producers.get(name)
        if node is None:
            return tuple(self._weights[name].dims)
        if node.op_type == "Constant":
            return next((tuple(entry.t.dims) for entry in node.attribute if entry.name == "value"), ())
        shape = self._shape_of(node.input[0])
        if node.op_type in ("Cast", "Identity"):
            return shape
        if node.op_type == "Transpose":
            order = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), None)
            return tuple(shape[axis] for axis in order or reversed(range(len(shape))))
        raise self._objection(f"a constant {name} made by {node.op_type}", "an initializer")

    def _rows_of(self, matrix: str) -> int:
        shape = self._shape_of(matrix)
        if len(shape) != 2:
            raise self._objection(f"a head of shape {shape}", "a matrix (d, vocab)")
        return shape[0]

    def _constant(self, name: str, value: int | list[int]) -> str:
        """An initializer of int64; returns its name."""
        import numpy as np
        import onnx

        tensor = onnx.numpy_helper.from_array(np.array(value, np.int64), f"{_PREFIX}{name}")
        self._graph.initializer.append(tensor)
        return str(tensor.name)

    def _redirect(self, value: str, to: str) -> None:
        """Let every node that reads ``value`` read ``to``."""
        for node in self._consumers[value]:
            for index, name in enumerate(node.input):
                if name == value:
                    node.input[index] = to

    @staticmethod
    def _set_length(value: onnx.ValueInfoProto, capacity: int) -> None:
        dim = value.type.tensor_type.shape.dim[_CACHE_AXIS]
        dim.Clear()
        dim.dim_value = capacity

    def _objection(self, received: str, expected: str) -> GraphError:
        return GraphError(
            f"{self._name}: {received}, expected {expected}: only a base graph that this kit exported with --target "
            "portable becomes an engine; export it again"
        )
