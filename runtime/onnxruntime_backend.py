"""Engines and task graphs on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from adalink.runtime.engine import Array
from adalink.runtime.errors import BackendError, BackendUnavailableError, GraphError, RequestError
from adalink.runtime.manifest import Base

if TYPE_CHECKING:
    import onnxruntime as ort

T = TypeVar("T")

_ORT_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}
_PROVIDERS = {"onnxruntime-cpu": "CPUExecutionProvider"}


class OnnxRuntimeBackend:
    """ONNX Runtime with one execution provider.

    Attributes:
        name: ``onnxruntime-cpu``.
    """

    def __init__(self, name: str, threads: int | None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendUnavailableError(
                f"backend {name} needs ONNX Runtime, which is not installed: pip install 'adalink-kit[cpu]'"
            ) from error
        if threads is not None and threads < 1:
            raise RequestError(f"threads is {threads}, expected at least 1")
        self.name = name
        self._ort = onnxruntime
        self._threads = threads

    def open_engine(self, graph: Path, base: Base, role: str) -> OnnxEngine:
        """See ``adalink.runtime.engine.Backend``."""
        if base.embedding_dtype == "bfloat16":
            raise BackendError(
                "onnxruntime-cpu has no bfloat16 kernels: export the base again with --dtype fp32 or fp16, "
                "or use this deployment with TensorRT"
            )
        session = self._session(str(graph), self._threads or 0, origin=str(graph))
        return OnnxEngine(session, self._ort, base, role, origin=str(graph))

    def open_task(self, graph: bytes, base: Base, modalities: tuple[str, ...]) -> OnnxTask:
        """See ``adalink.runtime.engine.Backend``. A task graph is tiny: one thread, no thread pool of its own."""
        return OnnxTask(self._session(graph, 1, origin="task graph"), self._ort, base, modalities)

    def _session(self, model: str | bytes, threads: int, origin: str) -> ort.InferenceSession:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        provider = _PROVIDERS[self.name]
        return guard(self._ort, origin, lambda: self._ort.InferenceSession(model, options, providers=[provider]))


class OnnxEngine:
    """A base graph in one session; the cache is the list of the session's own output tensors, never copied."""

    def __init__(self, session: ort.InferenceSession, runtime: ModuleType, base: Base, role: str, origin: str) -> None:
        self._session: ort.InferenceSession | None = session
        self._ort = runtime
        self._origin = origin
        self._past = [node.name for node in session.get_inputs() if node.name.startswith("past_key_values.")]
        self._inputs = frozenset(node.name for node in session.get_inputs()) - set(self._past)
        present = [name.replace("past_key_values", "present", 1) for name in self._past]
        outputs = [node.name for node in session.get_outputs()]
        first = "logits" if base.kind == "decoder" or role == "decoder" else "last_hidden_state"
        self._outputs = [first, *present]
        self._cache_shape = (base.cache.kv_heads, 0, base.cache.head_dim) if base.cache else None
        needs_cache = base.cache is not None and (base.kind == "decoder" or role == "decoder")
        layers = base.cache.layers if needs_cache and base.cache else 0
        wanted = {f"past_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")}
        for name in ("inputs_embeds", "attention_mask"):
            if role == "base" and name not in self._inputs:
                raise GraphError(_wrong(origin, "input", name, sorted(self._inputs)))
        if wanted != set(self._past):
            differing = sorted(wanted ^ set(self._past))[0]
            raise GraphError(_wrong(origin, "input", differing, sorted(self._past)))
        for name in self._outputs:
            if name not in outputs:
                raise GraphError(_wrong(origin, "output", name, outputs))
        types = {node.name: node.type for node in session.get_inputs()}
        expected = _ORT_TYPES[base.embedding_dtype]
        if types["inputs_embeds"] != expected:
            raise GraphError(
                f"{origin}: inputs_embeds is {types['inputs_embeds']}, the contract says {expected}: export it again"
            )
        self._cache_dtype = np.dtype(base.embedding_dtype)

    @property
    def inputs(self) -> frozenset[str]:
        """See ``adalink.runtime.engine.Engine``."""
        return self._inputs

    def run(self, feeds: Mapping[str, Array], cache: object | None = None) -> tuple[Array, object | None]:
        """See ``adalink.runtime.engine.Engine``."""
        session = self._session
        if session is None:
            raise RequestError("the deployment is closed: open it again")
        make = self._ort.OrtValue.ortvalue_from_numpy
        values = {name: make(np.ascontiguousarray(feeds[name])) for name in self._inputs}
        if self._past:
            if cache is None:
                assert self._cache_shape is not None
                batch = feeds["inputs_embeds"].shape[0]
                empty = make(np.zeros((batch, *self._cache_shape), self._cache_dtype))
                past = [empty] * len(self._past)
            else:
                assert isinstance(cache, list)
                past = cache
            values.update(zip(self._past, past, strict=True))
        outputs = guard(self._ort, self._origin, lambda: session.run_with_ort_values(self._outputs, values))
        return outputs[0].numpy(), (outputs[1:] if self._past else None)

    def close(self) -> None:
        """See ``adalink.runtime.engine.Engine``."""
        self._session = None


class OnnxTask:
    """A task graph in one session."""

    def __init__(
        self, session: ort.InferenceSession, runtime: ModuleType, base: Base, modalities: tuple[str, ...]
    ) -> None:
        self._session = session
        self._ort = runtime
        inputs = {node.name: node for node in session.get_inputs()}
        wanted = {"inputs_embeds", "modality"} if len(modalities) > 1 else {"inputs_embeds"}
        if inputs.keys() != wanted:
            name = sorted(inputs.keys() ^ wanted)[0]
            raise GraphError(_wrong("task graph", "input", name, sorted(inputs)))
        node = inputs["inputs_embeds"]
        expected = _ORT_TYPES[base.embedding_dtype]
        if node.type != expected or node.shape[-1] != base.hidden_size:
            raise GraphError(
                f"task graph: inputs_embeds is {node.type} of width {node.shape[-1]}, the base takes {expected} of "
                f"width {base.hidden_size}: export the adapter again for this base"
            )
        outputs = [node.name for node in session.get_outputs()]
        if len(outputs) != 1:
            raise GraphError(_wrong("task graph", "output", "one output alone", outputs))
        self._outputs = outputs
        self._metadata: dict[str, str] = dict(session.get_modelmeta().custom_metadata_map)

    @property
    def metadata(self) -> Mapping[str, str]:
        """See ``adalink.runtime.engine.TaskRunner``."""
        return self._metadata

    def run(self, inputs_embeds: Array, modality: Array | None) -> Array:
        """See ``adalink.runtime.engine.TaskRunner``."""
        feeds = {"inputs_embeds": inputs_embeds}
        if modality is not None:
            feeds["modality"] = modality
        result: Array = guard(self._ort, "task graph", lambda: self._session.run(self._outputs, feeds))[0]
        return result


def guard(runtime: ModuleType, origin: str, call: Callable[[], T]) -> T:
    """Call ONNX Runtime; every exception of its own becomes a ``BackendError``. The one place where that is done."""
    try:
        return call()
    except onnxruntime_errors(runtime) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackendError(f"{origin}: ONNX Runtime refused: {reason}") from error


def onnxruntime_errors(runtime: ModuleType) -> tuple[type[Exception], ...]:
    """Every exception type that ONNX Runtime's binding defines."""
    state = runtime.capi.onnxruntime_pybind11_state
    return tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))


def _wrong(origin: str, what: str, name: str, received: list[str]) -> str:
    return (
        f"{origin}: {what} {name!r} does not match the contract; the graph has {received}. "
        "Export it with 'adalink export' (docs/formats.md lists the names)"
    )
