"""Engines on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from adalink.runtime.engine import Array
from adalink.runtime.errors import BackendError, BackendUnavailableError, GraphError, RequestError
from adalink.runtime.manifest import Base
from adalink.runtime.onnxruntime_bank import OnnxBankGraph
from adalink.runtime.onnxruntime_boundary import ORT_TYPES, guard, wrong_name

if TYPE_CHECKING:
    import onnxruntime as ort

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

    def open_bank(self, graph: bytes, base: Base) -> OnnxBankGraph:
        """See ``adalink.runtime.engine.Backend``. A bank graph is tiny: one thread, no thread pool of its own."""
        return OnnxBankGraph(self._session(graph, 1, origin="bank graph"), self._ort, base)

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
                raise GraphError(wrong_name(origin, "input", name, sorted(self._inputs)))
        if wanted != set(self._past):
            differing = sorted(wanted ^ set(self._past))[0]
            raise GraphError(wrong_name(origin, "input", differing, sorted(self._past)))
        for name in self._outputs:
            if name not in outputs:
                raise GraphError(wrong_name(origin, "output", name, outputs))
        types = {node.name: node.type for node in session.get_inputs()}
        expected = ORT_TYPES[base.embedding_dtype]
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
