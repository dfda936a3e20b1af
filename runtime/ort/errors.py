"""ONNX Runtime's exceptions, converted to ours here alone, and its dtype names."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

from adalink.runtime.errors import BackendError

T = TypeVar("T")

INT8 = "tensor(int8)"
ORT_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}


def guard(runtime: ModuleType, origin: str, call: Callable[[], T]) -> T:
    """Call ONNX Runtime; its exceptions become ``BackendError``, also while it reads names out of a graph."""
    try:
        return call()
    except onnxruntime_errors(runtime) as error:
        raise refusal(origin, error) from error


def refusal(origin: str, error: Exception) -> BackendError:
    """Convert an exception of ONNX Runtime."""
    if isinstance(error, UnicodeDecodeError):
        reason = bytes(error.object).decode("utf-8", "backslashreplace").strip()
        return BackendError(f"{origin}: ONNX Runtime says what is not UTF-8: {_first_line(reason)!r}; export it again")
    return BackendError(f"{origin}: ONNX Runtime refused: {_first_line(str(error)) or type(error).__name__}")


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip()


def onnxruntime_errors(runtime: ModuleType) -> tuple[type[Exception], ...]:
    """Exception types of ONNX Runtime.

    Its own; ``RuntimeError`` from a run with IO binding; and ``UnicodeDecodeError``, which Python raises in place of
    any of them, and of any name, that quotes bytes of a damaged graph.
    """
    state = runtime.capi.onnxruntime_pybind11_state
    exceptions = (kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (RuntimeError, UnicodeDecodeError, *exceptions)


def wrong_name(origin: str, what: str, name: str, received: list[str]) -> str:
    """Message for a graph that lacks the input or output ``name``."""
    return (
        f"{origin}: {what} {name!r} does not match the contract; the graph has {received}. "
        "Export it with 'adalink export' (docs/concepts/file-formats.md lists the names)"
    )
