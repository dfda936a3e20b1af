"""What an engine is to the rest of the runtime.

A backend opens things; an engine runs a base; a bank graph runs tasks. All are small protocols, so that a new backend
touches no caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from adalink.runtime.arrays import Array
from adalink.runtime.profile import Profile
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.vision_base import VisionBase
from adalink.runtime.storage.vision_schema import Grid, PatchTower

if TYPE_CHECKING:
    from adalink.runtime.tasks.adapter_mapping import AdapterMapping

# Embeddings on their way to an engine: an array on the host, or what a device's embedder makes of ids and tasks.
EngineInput = Any


class DecodeState(Protocol):
    """A batch between two decode steps: its rows, their KV cache and logits. For one thread at a time."""

    @property
    def logits(self) -> Array:
        """What follows the last token of each row, shape ``(rows, vocab)``; the next step writes over it."""
        ...

    def step(self, inputs_embeds: EngineInput) -> None:
        """Take one more token of each row.

        Args:
            inputs_embeds: what the embedder gave for one token of each row, of shape ``(rows, 1, d)``.

        Raises:
            BackendError: the engine refused.
        """
        ...

    def drop(self, row: int) -> None:
        """Forget a row, which costs nothing from then on; the last row takes its place and its number."""
        ...

    def close(self) -> None:
        """Let others have what it holds; nothing else is called after it."""
        ...


class Engine(Protocol):
    """A base graph ready to run, safe for calls from several threads."""

    @property
    def embedder(self) -> InputEmbedder:
        """What gives it its embeddings."""
        ...

    @property
    def profile(self) -> Profile | None:
        """Shapes that it takes; ``None`` if it takes any."""
        ...

    @property
    def padding_side(self) -> str:
        """Where it wants prompts to be padded, ``"left"`` or ``"right"``; padding elsewhere is moved there."""
        ...

    def run(self, feeds: Mapping[str, EngineInput]) -> Array:
        """Run whole sequences.

        Args:
            feeds: ``inputs_embeds`` as the embedder gave it, of shape ``(batch, seq, d)``, and ``attention_mask`` of
                shape ``(batch, seq)``, for the decoder of an encoder-decoder also ``encoder_hidden_states`` and
                ``encoder_attention_mask``, and for a base whose positions follow images ``position_ids`` of shape
                ``(batch, seq, axes)``.

        Returns:
            Logits or hidden states at every position, shape ``(batch, seq, vocab)`` or ``(batch, seq, d)``; what it
            holds at padding means nothing.

        Raises:
            BackendError: the engine refused.
        """
        ...

    def start(self, feeds: Mapping[str, EngineInput], max_new_tokens: int) -> DecodeState:
        """Run prompts, to go on after them; only for graphs with a KV cache.

        Args:
            feeds: as for ``run``.
            max_new_tokens: how many steps may follow.

        Raises:
            BackendError: the engine refused.
        """
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


class ResumableDecodeState(DecodeState, Protocol):
    """A decode state whose KV cache can be kept for later prompts."""

    def states(self, row: int, length: int) -> Array:
        """A copy of what a row's first tokens left in the cache, as ``ResumableEngine.resume`` takes it."""
        ...


@runtime_checkable
class SpeculativeDecodeState(DecodeState, Protocol):
    """A decode state that takes several tokens of its only row at once, so that draft tokens can be verified."""

    def verify(self, inputs_embeds: EngineInput) -> Array:
        """Run the next token and the draft tokens behind it in one pass; ``logits`` is not touched.

        Args:
            inputs_embeds: what the embedder gave for them, of shape ``(1, n, d)``.

        Returns:
            What follows each of them, shape ``(n, vocab)``; the next call writes over it.

        Raises:
            BackendError: the engine refused.
        """
        ...

    def rollback(self, count: int) -> None:
        """Forget that many of the row's last tokens: the draft tokens that were rejected."""
        ...


@runtime_checkable
class ResumableEngine(Protocol):
    """An engine whose prompts can go on from states that were kept."""

    def resume(
        self, feeds: Mapping[str, EngineInput], max_new_tokens: int, known: Sequence[Array | None]
    ) -> ResumableDecodeState:
        """Do what ``Engine.start`` does.

        Args:
            feeds: as for ``Engine.start``.
            max_new_tokens: likewise.
            known: for each row what its first tokens left in a cache before, shape
                ``(2 * layers, kv_heads, n, head_dim)``, fewer than the row has, or ``None``.

        Raises:
            BackendError: the engine refused.
        """
        ...


class InputEmbedder(Protocol):
    """What stands before an engine: the embedding table and the adapters; safe for calls from several threads."""

    def lookup(self, ids: Array, tasks: AdapterMapping, modality: Array | None = None) -> EngineInput:
        """Token ids of shape ``(batch, seq)``, each row through its task, as the engine takes them."""
        ...

    def apply(self, embeds: Array, tasks: AdapterMapping, modality: Array | None = None) -> EngineInput:
        """Embeddings of shape ``(batch, seq, d)``, each row through its task, as the engine takes them."""
        ...

    def for_decoding(self, tasks: AdapterMapping) -> AdapterMapping:
        """What generated tokens go through, prepared so that a step costs little."""
        ...

    def read(self, engine_input: EngineInput) -> Array:
        """What was given to the engine, as an array of shape ``(batch, seq, d)``."""
        ...


class SharedAdapterGraph(Protocol):
    """The arithmetic of all adapters of one activation, with their weights as inputs; safe for several threads."""

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
        """Images, or tiles of them, that a call takes at most."""
        ...

    def run(self, pixel_values: Array) -> Array:
        """Encode images.

        Args:
            pixel_values: float32 with shape ``(images, 3, height, width)``, 1 to ``most_images`` of them.

        Returns:
            float32 with shape ``(images, tokens_per_image, d)``, the caller's own.

        Raises:
            BackendError: the engine refused.
            GraphError: the result has another shape.
        """
        ...

    def close(self) -> None:
        """Give its memory back; nothing else is called after it."""
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
        """Give its memory back; nothing else is called after it."""
        ...


class Backend(Protocol):
    """Opens engines, bank graphs and vision towers."""

    name: str

    def open_engine(self, graph: Path, base: Base, role: str, table: Array) -> Engine:
        """Open a base graph with its embedder.

        Args:
            graph: an ONNX graph, or the plan of a compiled engine.
            base: the contract.
            role: ``"base"`` or ``"decoder"`` (of an encoder-decoder).
            table: the embedding table, shape ``(vocab, d)``.

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
