"""Protocols of a backend: engine, decode state, input embedder, shared adapter graph, vision graph.

A backend opens engines and graphs. An engine runs the base; a shared adapter graph runs adapters. A new backend
implements these protocols and changes no caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from adalink.runtime.arrays import Array
from adalink.runtime.profile import Profile
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.vision_base import VisionBase
from adalink.runtime.storage.vision_schema import Grid, PatchTower

if TYPE_CHECKING:
    from adalink.runtime.tasks.adapter_mapping import AdapterMapping

# Input of an engine: an array on the host, or the ids and tasks from which a device computes the embeddings.
EngineInput = Any


class DecodeState(Protocol):
    """State of a batch between two decode steps: rows, KV cache, logits. For one thread at a time."""

    @property
    def logits(self) -> Array:
        """Logits after the last token of each row, shape ``(rows, vocab)``; the next step overwrites them."""
        ...

    def step(self, inputs_embeds: EngineInput) -> None:
        """Decode step: append one token to each row.

        Args:
            inputs_embeds: the embedder's result for one token of each row, shape ``(rows, 1, d)``.

        Raises:
            BackendError: the engine refused.
        """
        ...

    def drop(self, row: int) -> None:
        """Remove a row from the batch; the last row takes its index."""
        ...

    def close(self) -> None:
        """Release the buffers; the last call."""
        ...


class Engine(Protocol):
    """A base graph ready to run, safe for calls from several threads."""

    @property
    def embedder(self) -> InputEmbedder:
        """The input embedder that belongs to this engine."""
        ...

    @property
    def profile(self) -> Profile | None:
        """Shapes that the engine takes; ``None`` if any."""
        ...

    @property
    def padding_side(self) -> str:
        """Preferred padding side, ``"left"`` or ``"right"``; other padding is moved there."""
        ...

    def run(self, feeds: Mapping[str, EngineInput]) -> Array:
        """Run whole sequences.

        Args:
            feeds: ``inputs_embeds``, the embedder's result, of shape ``(batch, seq, d)``, and ``attention_mask`` of
                shape ``(batch, seq)``. The decoder of an encoder-decoder also takes ``encoder_hidden_states`` and
                ``encoder_attention_mask``. A base whose positions follow images also takes ``position_ids`` of shape
                ``(batch, seq, axes)``. An encoder with token types also takes ``token_type_ids`` of shape
                ``(batch, seq)``, all 0 by default.

        Returns:
            Logits or hidden states at every position, shape ``(batch, seq, vocab)`` or ``(batch, seq, d)``; values at
            padding are undefined.

        Raises:
            BackendError: the engine refused.
        """
        ...

    def start(self, feeds: Mapping[str, EngineInput], max_new_tokens: int) -> DecodeState:
        """Prefill: run prompts and keep their KV cache; only for graphs with one.

        Args:
            feeds: as for ``run``.
            max_new_tokens: most decode steps that may follow.

        Raises:
            BackendError: the engine refused.
        """
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


@runtime_checkable
class SpeculativeDecodeState(DecodeState, Protocol):
    """A decode state that verifies several draft tokens of its only row in one pass."""

    def verify(self, inputs_embeds: EngineInput) -> Array:
        """Run the next token and the draft tokens after it in one pass; ``logits`` stays as it is.

        Args:
            inputs_embeds: the embedder's result for these tokens, shape ``(1, n, d)``.

        Returns:
            Logits after each token, shape ``(n, vocab)``; the next call overwrites them.

        Raises:
            BackendError: the engine refused.
        """
        ...

    def rollback(self, count: int) -> None:
        """Remove the row's last ``count`` tokens: the rejected draft tokens."""
        ...


class SlotState(SpeculativeDecodeState, Protocol):
    """A decode state that new rows join between two steps (continuous batching)."""

    def begin(self, states: Array | None) -> None:
        """Append a row without tokens, or after a KV prefix or cached states.

        Args:
            states: keys and values of the row's first ``n`` positions, shape
                ``(2 * layers, kv_heads, n, head_dim)``, as ``states`` returns them; or ``None``.

        Raises:
            RequestError: there is no memory for it.
        """
        ...

    def extend(self, feeds: Mapping[str, EngineInput], start: int, stop: int) -> None:
        """Run the next positions of the last row's prompt; its ``logits`` are then those after the last of them.

        Args:
            feeds: the whole prompt, as for ``Engine.start``, a batch of one row.
            start: positions of it that the row has already; a KV prefix is before them.
            stop: positions of it that the row has afterwards.

        Raises:
            BackendError: the engine refused.
        """
        ...

    def adopt(self, state: Any) -> None:
        """Append the rows of another decode state of the same engine, with caches and logits.

        The other one runs no more. It may be adopted again, as long as none of its rows has left an adopter.

        Raises:
            RequestError: there is no memory for them.
        """
        ...

    def states(self, row: int, length: int, start: int = 0) -> Array:
        """A copy of the keys and values of a row's positions ``start`` to ``length``, as ``begin`` takes them."""
        ...


@runtime_checkable
class SlotEngine(Protocol):
    """An engine whose batch takes new rows at any step."""

    def open_slots(self, slots: int, capacity: int) -> SlotState:
        """An empty batch; ``Engine.start`` gives one with rows.

        Args:
            slots: rows that fit before buffers grow.
            capacity: tokens of a row, prompt and generated ones, that fit before buffers grow.

        Raises:
            RequestError: there is no memory for the KV cache.
        """
        ...


@runtime_checkable
class KvPrefixEngine(Protocol):
    """An engine whose rows can begin with given keys and values, without any change to its graph.

    Positions of a row's tokens count on from its KV prefix, and nothing stands between the two.
    """

    def run_after(self, kv_prefixes: Sequence[Array | None], feeds: Mapping[str, EngineInput]) -> Array:
        """As ``Engine.run``.

        Args:
            kv_prefixes: keys and values before each row's first token, as ``SlotState.begin`` takes them.
            feeds: as for ``Engine.run``, without ``position_ids``.

        Raises:
            BackendError: the engine refused.
        """
        ...

    def start_after(
        self, kv_prefixes: Sequence[Array | None], feeds: Mapping[str, EngineInput], max_new_tokens: int
    ) -> DecodeState:
        """As ``Engine.start``; arguments and errors as of ``run_after``."""
        ...

    def read_states(self, feeds: Mapping[str, EngineInput]) -> Array:
        """Keys and values of one row of tokens, as ``SlotState.begin`` takes them; raises as ``Engine.start``."""
        ...


class InputEmbedder(Protocol):
    """Embedding table and adapters before an engine; safe for calls from several threads."""

    def lookup(self, ids: Array, tasks: AdapterMapping, modality: Array | None = None) -> EngineInput:
        """Adapted embeddings of token ids of shape ``(batch, seq)``, each row by its task."""
        ...

    def apply(self, embeds: Array, tasks: AdapterMapping, modality: Array | None = None) -> EngineInput:
        """Adapted embeddings of embeddings of shape ``(batch, seq, d)``, each row by its task."""
        ...

    def for_decoding(self, tasks: AdapterMapping) -> AdapterMapping:
        """The adapter mapping of generated tokens, prepared for fast decode steps."""
        ...

    def read(self, engine_input: EngineInput) -> Array:
        """The engine's input as an array of shape ``(batch, seq, d)``."""
        ...


class SharedAdapterGraph(Protocol):
    """One graph for all adapters of one activation and bias, with weights as inputs; safe for several threads."""

    def run(self, inputs_embeds: Array, weights: Mapping[str, Array]) -> Array:
        """Adapt embeddings.

        Args:
            inputs_embeds: shape ``(batch, seq, d)``, in the base's dtype.
            weights: float32, ``down`` ``(n, r, d)`` and ``up`` ``(n, d, r)``, with a bias also ``down_bias``
                ``(n, 1, r)`` and ``up_bias`` ``(n, 1, d)``; ``n`` is ``batch``, or 1 for all rows.

        Returns:
            Adapted embeddings of the shape and dtype of ``inputs_embeds``.

        Raises:
            BackendError: the engine refused.
        """
        ...


class VisionGraph(Protocol):
    """A vision tower ready to run; for one thread at a time."""

    @property
    def most_images(self) -> int:
        """Most images, or tiles of them, in a call."""
        ...

    def run(self, pixel_values: Array) -> Array:
        """Encode images.

        Args:
            pixel_values: float32 with shape ``(images, 3, height, width)``, 1 to ``most_images`` of them.

        Returns:
            float32 with shape ``(images, tokens_per_image, d)``; owned by the caller.

        Raises:
            BackendError: the engine refused.
            GraphError: the result has another shape.
        """
        ...

    def close(self) -> None:
        """Free its memory; the last call."""
        ...


class PatchVisionGraph(Protocol):
    """A vision tower for images that keep their shape; for one thread at a time."""

    def run(self, pixel_values: Array, grid: Grid) -> Array:
        """Encode one image.

        Args:
            pixel_values: its patches, float32 with shape ``(patches, numbers)``.
            grid: its rows and columns of pieces.

        Returns:
            float32 with shape ``(positions, d)``.

        Raises:
            BackendError: the engine refused.
            GraphError: the result has another shape.
        """
        ...

    def close(self) -> None:
        """Free its memory; the last call."""
        ...


class Backend(Protocol):
    """Opens engines, shared adapter graphs and vision towers."""

    name: str

    def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> Engine:
        """Open a base graph with its embedder.

        Args:
            graph: an ONNX graph, or the plan of a compiled engine.
            base: the contract.
            role: ``"base"`` or ``"decoder"`` (of an encoder-decoder).
            table: the embedding table.

        Raises:
            BackendError: the engine cannot load it.
            GraphError: its inputs or outputs are not those of a base graph.
        """
        ...

    def open_bank(self, activation_key: str, graph: bytes, base: Base) -> SharedAdapterGraph:
        """Open the shared graph of all adapters with one activation and bias; raises as ``open_engine`` does.

        Args:
            activation_key: one of ``adalink.runtime.storage.adapter_spec.ACTIVATION_KEYS``.
            graph: the ONNX graph as bytes.
            base: the contract.
        """
        ...

    def open_vision(self, graph: Path, base: VisionBase) -> VisionGraph:
        """Open the vision tower of a base whose images or tiles have one size, an ONNX graph or a plan.

        Raises as ``open_engine`` does.
        """
        ...

    def open_patch_vision(self, graph: Path, base: VisionBase, patches: PatchTower) -> PatchVisionGraph:
        """Open the vision tower of a base whose images keep their shape.

        Args:
            graph: an ONNX graph.
            base: the base.
            patches: how its tower looks at images, which is ``base.vision.patches``.

        Raises:
            BackendError: the engine cannot load it, or runs no such tower.
            GraphError: its inputs or outputs are not those of such a graph.
        """
        ...
