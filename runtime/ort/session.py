"""Session of a base graph: its signature, checked once, and calls that convert errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from adalink.runtime.errors import BackendError, GraphError, RequestError
from adalink.runtime.ort.errors import INT8, ORT_TYPES, guard, wrong_name
from adalink.runtime.storage.manifest import Base

if TYPE_CHECKING:
    import onnxruntime as ort

    from adalink.runtime.arrays import Array

# Metadata key of a base graph: the oldest ONNX Runtime that computes it correctly.
NEEDS_ONNXRUNTIME = "needs_onnxruntime"

T = TypeVar("T")


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a base graph.

    Attributes:
        inputs: names of its inputs, without the cache.
        past: names of the cache inputs: key and value of each layer in order.
        present: names of the cache outputs, in the same order.
        output: name of the output beside the cache.
        vocab_size: columns of the logits.
        cache_shape: ``(kv_heads, head_dim)``; zeros for a graph without a cache.
        dtype: dtype of embeddings and output.
        cache_dtype: dtype of the cache.
    """

    inputs: frozenset[str]
    past: tuple[str, ...]
    present: tuple[str, ...]
    output: str
    vocab_size: int
    cache_shape: tuple[int, int]
    dtype: np.dtype[Any]
    cache_dtype: np.dtype[Any]

    @property
    def in_place(self) -> bool:
        """Whether the cache is written in place (docs/concepts/file-formats.md, "Graphs")."""
        return "sequence_lengths" in self.inputs


def read_signature(session: ort.InferenceSession, base: Base, role: str, origin: str) -> Signature:
    """Check that a session runs a base graph; raises ``GraphError``."""
    types = {node.name: node.type for node in session.get_inputs()}
    outputs = [node.name for node in session.get_outputs()]
    past = tuple(name for name in types if name.startswith("past_key_values."))
    is_decoder = base.kind == "decoder" or role == "decoder"
    cache = base.cache if is_decoder else None
    signature = Signature(
        inputs=frozenset(types) - set(past),
        past=past,
        present=tuple(name.replace("past_key_values", "present", 1) for name in past),
        output="logits" if is_decoder else "last_hidden_state",
        vocab_size=base.vocab_size,
        cache_shape=(cache.kv_heads, cache.head_dim) if cache else (0, 0),
        dtype=np.dtype(base.embedding_dtype),
        cache_dtype=np.dtype("int8" if past and types[past[0]] == INT8 else base.embedding_dtype),
    )
    lengths = ("sequence_lengths", "logits_at") if signature.in_place else ("attention_mask",)
    token_types = ("token_type_ids",) if base.takes_token_types else ()
    for name in ("inputs_embeds", *lengths, *token_types):
        if name not in types:
            raise GraphError(wrong_name(origin, "input", name, sorted(types)))
    expected_past = {past for past, _ in cache.names()} if cache else set()
    if expected_past != set(past):
        raise GraphError(wrong_name(origin, "input", sorted(expected_past ^ set(past))[0], sorted(past)))
    for name in (signature.output, *signature.present):
        if name not in outputs:
            raise GraphError(wrong_name(origin, "output", name, outputs))
    expected = ORT_TYPES[base.embedding_dtype]
    if types["inputs_embeds"] != expected:
        raise GraphError(
            f"{origin}: inputs_embeds is {types['inputs_embeds']}, the contract says {expected}: export it again"
        )
    return signature


def check_version(session: ort.InferenceSession, installed: str, origin: str) -> None:
    """Refuse a graph that this ONNX Runtime computes incorrectly; raises ``BackendError``."""
    needed = session.get_modelmeta().custom_metadata_map.get(NEEDS_ONNXRUNTIME)
    if needed is not None and is_older(installed, needed):
        raise BackendError(
            f"{origin} needs ONNX Runtime {needed} or newer and would be computed wrongly by {installed}: install a "
            "newer one, or export the base here with --target portable"
        )


def is_older(version: str, than: str) -> bool:
    """Whether a version such as ``1.23.2`` comes before one such as ``1.24``."""
    from packaging.version import Version  # few graphs ask

    return Version(version).release < Version(than).release


class GuardedSession:
    """A session that can be closed and converts ONNX Runtime's errors."""

    def __init__(self, session: ort.InferenceSession, runtime: ModuleType, origin: str) -> None:
        self._session: ort.InferenceSession | None = session
        self._ort = runtime
        self._origin = origin

    def call(self, use: Callable[[ort.InferenceSession], T]) -> T:
        """Use the session; raises ``BackendError`` if it refuses, ``RequestError`` if it is closed."""
        session = self._session
        if session is None:
            raise RequestError("the deployment is closed: open it again")
        return guard(self._ort, self._origin, lambda: use(session))

    def value(self, array: Array) -> ort.OrtValue:
        """A contiguous array as an ``OrtValue``, which shares its memory."""
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def close(self) -> None:
        """Release the session; running calls finish first."""
        self._session = None
