"""ONNX Runtime executor: a graph whose inputs and outputs are bound to given addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING

from adalink.runtime.device.protocols import Executor, Tensor
from adalink.runtime.implements import implements
from adalink.runtime.ort.errors import onnxruntime_errors, refusal

if TYPE_CHECKING:
    import onnxruntime as ort

# Element types as ONNX numbers them, by ours.
ELEMENTS = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7, "bool": 9}
_NAMES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OnnxRuntimeExecutor:
    """See ``adalink.runtime.device.protocols.Executor``; a session may have many."""

    def __init__(
        self,
        session: ort.InferenceSession,
        runtime: ModuleType,
        origin: str,
        device_type: str,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Bind nothing yet.

        Args:
            session: the graph.
            runtime: the module ``onnxruntime``.
            origin: the graph's name, for messages.
            device_type: ONNX Runtime's name of the device that holds the addresses, ``"cuda"`` or ``"cpu"``.
            before: waits for work that the session's own stream does not wait for.
        """
        self._session = session
        self._ort = runtime
        self._origin = origin
        self._device_type = device_type
        self._before = before
        self._binding = session.io_binding()
        self.inputs: Mapping[str, Tensor] = _tensors(session.get_inputs())
        self.outputs: Mapping[str, Tensor] = _tensors(session.get_outputs())

    @implements(Executor)
    def bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        is_input = name in self.inputs
        tensor = self.inputs[name] if is_input else self.outputs[name]
        bind = self._binding.bind_input if is_input else self._binding.bind_output
        bind(name, self._device_type, 0, ELEMENTS[tensor.dtype], shape, address)

    def enqueue(self) -> None:
        """See ``adalink.runtime.device.protocols.Executor``; returns when the call is done."""
        self._before()
        try:
            self._session.run_with_iobinding(self._binding)
        except onnxruntime_errors(self._ort) as error:
            raise refusal(self._origin, error) from error

    @implements(Executor)
    def close(self) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()


def _tensors(nodes: list[ort.NodeArg]) -> dict[str, Tensor]:
    return {
        node.name: Tensor(_NAMES[node.type], tuple(size if isinstance(size, int) else -1 for size in node.shape))
        for node in nodes
    }
