"""Opening an ONNX Runtime session whose names and metadata can be read."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from adalink.runtime.ort.errors import guard

if TYPE_CHECKING:
    import onnxruntime as ort

CPU_PROVIDER = "CPUExecutionProvider"
Provider = str | tuple[str, dict[str, str]]


def open_session(
    runtime: ModuleType,
    origin: str,
    model: str | bytes,
    options: ort.SessionOptions,
    providers: Sequence[Provider] = (CPU_PROVIDER,),
) -> ort.InferenceSession:
    """Open a session, and read the names of its inputs, outputs and metadata once.

    ONNX Runtime opens a graph whose names are not UTF-8; Python then fails wherever one of them is read.

    Args:
        runtime: the module ``onnxruntime``.
        origin: the graph's name, for messages.
        model: path or bytes of the graph.
        options: options of the session.
        providers: execution providers in order; none for those that ``options`` add.

    Raises:
        BackendError: ONNX Runtime refuses the graph, or a name in it is not UTF-8.
    """

    def begin() -> ort.InferenceSession:
        settings: dict[str, Any] = {"providers": list(providers)} if providers else {}
        # On the CPU alone there is nothing to fall back to, and ONNX Runtime would print that it tries.
        settings |= {"enable_fallback": 0} if tuple(providers) == (CPU_PROVIDER,) else {}
        session = runtime.InferenceSession(model, options, **settings)
        for node in (*session.get_inputs(), *session.get_outputs()):
            _ = node.name, node.type, node.shape
        _ = session.get_modelmeta().custom_metadata_map
        return session

    return guard(runtime, origin, begin)
