"""Decoders with ONNX Runtime's ``GroupQueryAttention``: one attention node a layer, KV cache written in place.

The operator rotates queries and keys, appends keys and values to the cache behind each row's tokens, and attends
causally within a window. The model's own code is traced around it: transformers' rotary function returns queries and
keys unchanged, and the attention function becomes the operator. See docs/decisions/0005-decode-loop.md.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnxruntime
import torch
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache

from adalink.export.architectures import BARE_MASK, Architecture, mask_windows
from adalink.export.base.merged_linear import MergedLinear, find_groups, merged
from adalink.export.base.modules import axes_first
from adalink.export.tracing.attention import NAME, plain_attention
from adalink.export.tracing.graph import DOMAIN, OPERATOR
from adalink.runtime.errors import ModelError
from adalink.runtime.ort.session import is_older
from adalink.training.models.stand_ins import StandIns

# What the operator demands of its rotary tables (ONNX Runtime 1.31: group_query_attention_helper.h).
_HEAD_MULTIPLE, _ROTARY_MULTIPLE = 16, 16
# Before it, the operator lets a window of n tokens see n + 1 (microsoft/onnxruntime #25927).
WINDOWS_SINCE = "1.24"


def why_not_grouped(model: Any, architecture: Architecture) -> str | None:
    """Why a decoder keeps attention in standard operators; ``None`` where ``GroupedDecoderGraph`` can express it."""
    if has_windows(model, architecture) and is_older(onnxruntime.__version__, WINDOWS_SINCE):
        return f"ONNX Runtime {onnxruntime.__version__} lets its windows see a token too many; {WINDOWS_SINCE} does not"
    if architecture.bidirectional_prompt:
        return f"its prompt attends in both directions, and {OPERATOR} only causally"
    rotary = getattr(model.base_model, "rotary_emb", None)
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    if rotary is None or architecture.position_axes > 1:
        return None if head_dim % 8 == 0 else f"its heads are {head_dim} wide, no multiple of 8"
    if head_dim % _HEAD_MULTIPLE:
        return f"its heads are {head_dim} wide, no multiple of {_HEAD_MULTIPLE}"
    widths = {cos.shape[-1] for cos, _ in _rotary_tables(model, 1).values()}
    if bad := [width for width in widths if width % _ROTARY_MULTIPLE]:
        return f"its rotary embedding turns {bad[0]} numbers of a head, no multiple of {_ROTARY_MULTIPLE}"
    return None


def has_windows(model: Any, architecture: Architecture) -> bool:
    """Whether some layer of a decoder has sliding-window attention."""
    return any(mask_windows(model.config, architecture).values())


class GroupedDecoderGraph(torch.nn.Module):
    """A causal language model as ``(inputs_embeds, sequence_lengths, logits_at, *past) -> (logits, *present)``.

    Models with learned positions or with position ids of several axes also take ``position_ids``, before the cache. The
    model's own code computes rotary embeddings of several axes, outside the operator.
    """

    def __init__(
        self,
        model: Any,
        masks: dict[str, int | None],
        max_positions: int | None,
        position_axes: int = 1,
        stand_ins: StandIns | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: the decoder.
            masks: window sizes by mask name, from ``adalink.export.architectures.mask_windows``.
            max_positions: rows of the rotary tables.
            position_axes: numbers in a position id.
            stand_ins: what the model's matrices stand for.
        """
        super().__init__()
        self.model = model
        self.masks = masks
        self.rotates = hasattr(model.base_model, "rotary_emb") and position_axes == 1
        self._call: _Call | None = None
        example = torch.randn(1, 2, model.get_input_embeddings().weight.shape[1]).to(model.dtype)
        groups = find_groups(model, lambda: model(inputs_embeds=example, use_cache=False))
        self.products = [MergedLinear(group, stand_ins) for group in groups]
        # Layers whose attention takes a product's output unchanged.
        self._unchanged: set[int] = set()
        self._registered = torch.nn.ModuleList(self.products)
        if self.rotates:
            assert max_positions is not None
            for layer_type, (cos, sin) in _rotary_tables(model, max_positions).items():
                half = cos.shape[-1] // 2
                # Shared by all layers, and by name, so that the graph holds each once.
                self.register_buffer(f"cos_{layer_type}", cos[:, :half].contiguous())
                self.register_buffer(f"sin_{layer_type}", sin[:, :half].contiguous())

    def find_packed(self, *inputs: torch.Tensor) -> None:
        """Find the layers whose attention takes queries, keys and values as one product gives them.

        ``inputs``: example inputs of ``forward``. Products are drawn, so that what a norm changes shows.
        """
        for product in self.products:
            product.is_random = True
        try:
            with torch.no_grad():
                self(*inputs)
        finally:
            for product in self.products:
                product.is_random = False

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        sequence_lengths: torch.Tensor,
        logits_indices: torch.Tensor,
        *rest: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Logits at chosen positions, and the cache with the new keys and values.

        Args:
            inputs_embeds: shape ``(batch, sequence, d)``; rows are padded on the right.
            sequence_lengths: int32, tokens of each row, those in the cache and these, shape ``(batch,)``.
            logits_indices: the graph's input ``logits_at``: indices into the flattened ``(batch * sequence)``, shape
                ``(places,)``.
            rest: unless the operator rotates, ``position_ids``, shape ``(batch, sequence)`` or
                ``(batch, sequence, axes)``; then key and value of each layer in turn, shape
                ``(batch, kv_heads, capacity, head_dim)``.
        """
        past = rest if self.rotates else rest[1:]
        positions = torch.zeros(1, 1, dtype=torch.int64) if self.rotates else axes_first(rest[0])
        unused_mask = torch.zeros(1, 1, 1, 1)
        self._call = _Call(sequence_lengths - 1, sequence_lengths.max(), past)
        head = self.model.get_output_embeddings()
        gather = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[logits_indices],))
        try:
            with _grouped(self.model, self._attend, self.rotates), merged(self.products):
                output = self.model(
                    inputs_embeds=inputs_embeds,
                    attention_mask=unused_mask if BARE_MASK in self.masks else dict.fromkeys(self.masks, unused_mask),
                    position_ids=positions,
                    past_key_values=_PassThroughCache(),
                    use_cache=True,
                )
        finally:
            gather.remove()
        present = self._call.present
        return (output.logits, *(tensor for layer in sorted(present) for tensor in present[layer]))

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """The attention function that transformers calls, with heads before positions.

        Args:
            module: the attention module of a layer.
            query: shape ``(batch, heads, sequence, head_dim)``.
            key: shape ``(batch, kv_heads, sequence, head_dim)``: new positions only.
            value: likewise.
            attention_mask: not used; the operator masks by lengths and window.
            scaling: factor of the scores; ``head_dim ** -0.5`` by default.
            softcap: Gemma 2's cap on the scores, which is refused.

        Returns:
            The heads' outputs with shape ``(batch, sequence, 1, heads * head_dim)``, and no weights.
        """
        if softcap is not None:
            raise ModelError(f"{type(module).__name__} caps its attention scores at {softcap}: the export refuses it")
        assert self._call is not None
        call, layer = self._call, module.layer_idx
        mask_name = next(iter(self.masks)) if len(self.masks) == 1 else module.config.layer_types[layer]
        tables = []
        if self.rotates:
            name = _table_name(self.model, mask_name)
            tables = [getattr(self, f"cos_{name}"), getattr(self, f"sin_{name}")]
        settings = {
            "num_heads": int(query.shape[1]),
            "kv_num_heads": int(key.shape[1]),
            "scale": float(query.shape[-1] ** -0.5 if scaling is None else scaling),
            "local_window_size": self.masks[mask_name] or -1,
            "do_rotary": int(self.rotates),
        }
        parts = [_merge_heads(tensor) for tensor in (query, key, value)]
        packed = self._packed(module, parts)
        projected = parts if packed is None else [packed]
        output, *present = _GroupQueryAttention.apply(  # type: ignore[no-untyped-call]
            settings,
            len(projected),
            *projected,
            *call.past[2 * layer : 2 * layer + 2],
            call.seqlens_k,
            call.total,
            *tables,
        )
        call.present[layer] = present
        # Callers merge the last two dimensions, or all behind the sequence.
        return output.unsqueeze(2), None

    def _packed(self, module: Any, parts: list[torch.Tensor]) -> torch.Tensor | None:
        """The one product that queries, keys and values are slices of, if they are its unchanged slices."""
        children, width = [*module.children()], sum(int(part.shape[-1]) for part in parts)
        for product in self.products:
            if product.layers[0] not in children or product.output is None or len(product.weight) != width:
                continue
            if product.is_random and product.output.equal(torch.cat(parts, dim=-1)):
                self._unchanged.add(module.layer_idx)
            return product.output if module.layer_idx in self._unchanged else None
        return None


class _Call:
    """Inputs and outputs of the attention layers in one forward pass."""

    def __init__(self, seqlens_k: torch.Tensor, total: torch.Tensor, past: tuple[torch.Tensor, ...]) -> None:
        self.seqlens_k = seqlens_k
        self.total = total
        self.past = past
        self.present: dict[int, list[torch.Tensor]] = {}


class _PassThroughCache(DynamicCache):  # type: ignore[misc]
    """The model's view of the cache: new keys and values pass through; the operator stores them."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


class _GroupQueryAttention(torch.autograd.Function):
    """The operator for the exporter; evaluated in PyTorch it only returns the right shapes."""

    @staticmethod
    def forward(
        ctx: Any, settings: dict[str, Any], projections: int, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        past_key = inputs[projections]
        batch, heads, past, head_dim = map(int, past_key.shape)
        sequence = int(inputs[0].shape[1])
        grown = past_key.new_zeros(batch, heads, past + sequence, head_dim)
        # Random, so that products of it differ from those of other layers.
        output = torch.randn(batch, sequence, settings["num_heads"] * head_dim).to(past_key.dtype)
        return output, grown, grown.clone()

    @staticmethod
    def symbolic(g: Any, settings: dict[str, Any], projections: int, *inputs: Any) -> Any:
        attributes = {f"{k}_{'f' if isinstance(v, float) else 'i'}": v for k, v in settings.items()}
        absent = g.op("prim::Constant").setType(torch._C.OptionalType.ofTensor())
        query, past_key = inputs[0], inputs[projections]
        padding = [absent] * (3 - projections)
        output, *present = g.op(
            f"{DOMAIN}::{OPERATOR}", *inputs[:projections], *padding, *inputs[projections:], **attributes, outputs=3
        )
        _, heads, _, head_dim = past_key.type().varyingSizes()
        output.setType(query.type().with_sizes([None, None, settings["num_heads"] * head_dim]))
        for grown in present:
            grown.setType(past_key.type().with_sizes([None, heads, None, head_dim]))
        return output, *present


def _merge_heads(tensor: torch.Tensor) -> torch.Tensor:
    """Shape ``(batch, heads, sequence, head_dim)`` to ``(batch, sequence, heads * head_dim)``."""
    return tensor.transpose(1, 2).reshape(tensor.shape[0], tensor.shape[2], tensor.shape[1] * tensor.shape[3])


@contextmanager
def _grouped(model: Any, attend: Any, rotates: bool) -> Iterator[None]:
    """Let ``model`` call ``attend`` until the block ends; if it ``rotates``, the model itself does not."""
    AttentionInterface.register(NAME, attend)
    modules = {sys.modules[type(layer).__module__] for layer in model.modules()}
    rotating: list[Any] = [module for module in modules if rotates and hasattr(module, "apply_rotary_pos_emb")]
    before = [module.apply_rotary_pos_emb for module in rotating]
    for module in rotating:
        module.apply_rotary_pos_emb = _unrotated
    try:
        yield
    finally:
        for module, function in zip(rotating, before, strict=True):
            module.apply_rotary_pos_emb = function
        # A registered function stays for good, and would keep the whole model in memory.
        AttentionInterface.register(NAME, plain_attention)


def _unrotated(query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces transformers' rotation: the operator rotates queries and keys itself."""
    return query, key


def _rotary_tables(model: Any, positions: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Cosines and sines as the model computes them, shape ``(positions, rotary_dim)``, by layer type."""
    rotary = model.base_model.rotary_emb
    layer_types = sorted({*model.config.layer_types}) if _by_layer_type(rotary) else [""]
    tables = {}
    for layer_type in layer_types:
        position_ids = torch.arange(positions)[None]
        like = torch.zeros((), dtype=model.dtype)
        cos, sin = rotary(like, position_ids, layer_type) if layer_type else rotary(like, position_ids)
        tables[layer_type or "all"] = (cos[0], sin[0])
    return tables


def _by_layer_type(rotary: Any) -> bool:
    return "layer_type" in inspect.signature(rotary.forward).parameters


def _table_name(model: Any, mask_name: str) -> str:
    return mask_name if _by_layer_type(model.base_model.rotary_emb) else "all"
