"""TensorRT executor: a plan's execution context with one profile, on one stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adalink.runtime.device.protocols import Executor, Queue, Tensor
from adalink.runtime.errors import RequestError
from adalink.runtime.implements import implements
from adalink.runtime.trt.api import Api


class TensorRtExecutor:
    """See ``adalink.runtime.device.protocols.Executor``."""

    def __init__(self, api: Api, engine: Any, context: Any, profile: int, queue: Queue, origin: str) -> None:
        self._api = api
        self._engine: Any = engine
        self._context: Any = context
        self._profile = profile
        self._queue = queue
        self._origin = origin
        self.inputs, self.outputs = io_tensors(api, engine)
        api.clear()
        if not context.set_optimization_profile_async(profile, queue.handle):
            raise self._error(f"profile {profile} cannot be used")

    def bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        """See ``Executor``; raises ``RequestError`` for a shape outside the profile."""
        if name in self.inputs and not self._context.set_input_shape(name, shape):
            low, _, high = (tuple(sizes) for sizes in self._engine.get_tensor_profile_shape(name, self._profile))
            raise RequestError(
                f"{self._origin}: {name} has the shape {shape}, this engine takes {low} to {high}: send less at a "
                "time, or build it again with a wider 'adalink export engine --profile'"
            )
        if not self._context.set_tensor_address(name, address):
            raise self._error(f"{name} cannot be bound")

    @implements(Executor)
    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._queue.handle):
            raise self._error("a call failed")

    @implements(Executor)
    def close(self) -> None:
        self._context = None

    def _error(self, what: str) -> Exception:
        return self._api.error(f"{self._origin}: {what}", "run 'adalink doctor', then start the program again")


def io_tensors(api: Api, engine: Any) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Inputs and outputs of a plan."""
    trt = api.trt
    names = {
        trt.float32: "float32",
        trt.float16: "float16",
        trt.bfloat16: "bfloat16",
        trt.int64: "int64",
        trt.bool: "bool",
    }
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name)
        tensor = Tensor(names.get(dtype, str(dtype)), tuple(engine.get_tensor_shape(name)))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        (inputs if is_input else outputs)[name] = tensor
    return inputs, outputs
