"""Vision towers that take an image as patches in a grid of its own shape, as one graph for all grids.

Whatever depends on the grid alone is an input of the graph: the positions of patches, and which of them attend to each
other. The runtime computes it in numpy (``adalink.runtime.vision.patches``), so none of it is traced. The tower's own
layers are traced unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from adalink.export.tracing.attention import MASKED, plain_attention
from adalink.export.tracing.graph import TracedGraph
from adalink.runtime.errors import ModelError
from adalink.runtime.storage.vision_schema import PatchTower
from adalink.runtime.vision.patches import Patching

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Classes of the language models, but for the axes of their positions: the modules have the same names.
_TEXT_MODELS = {"qwen2_vl_text": "Qwen2ForCausalLM", "qwen2_5_vl_text": "Qwen2ForCausalLM"}
# Grid of the traced image: rows and columns of pieces that fill no whole number of windows.
_EXAMPLE = (3, 5)


def empty_decoder(config: PretrainedConfig) -> PreTrainedModel:
    """A language model with a head, of the class that the config of an inner model belongs to.

    Raises:
        ValueError: there is no such class.
    """
    import transformers

    if config.model_type not in _TEXT_MODELS:
        causal_lm: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
        return causal_lm
    decoder: PreTrainedModel = getattr(transformers, _TEXT_MODELS[config.model_type])(config)
    return decoder


def check_embeddings_suffice(model: PreTrainedModel) -> None:
    """Check that a model's images reach its language model as embeddings alone; raises ``ModelError``."""
    if layers := getattr(model.config.vision_config, "deepstack_visual_indexes", None):
        raise ModelError(
            f"this {type(model).__name__} cannot be exported behind inputs_embeds: layers {list(layers)} of its vision "
            "tower also hand their states to the first layers of its language model (deepstack); adapters can be "
            "attached to it and trained, and Qwen2.5-VL can be exported"
        )


def describe_patch_tower(model: PreTrainedModel) -> PatchTower:
    """Merging and windows of a supported model's tower."""
    config: Any = model.config.vision_config
    window = None
    if _full_attention_layers(config) < set(range(config.depth)):
        window = config.window_size // config.spatial_merge_size // config.patch_size
    return PatchTower(merge=config.spatial_merge_size, window=window)


def check_patching(model: PreTrainedModel, patching: Patching) -> None:
    """Check that the image processor cuts the patches that the tower takes; raises ``ModelError``."""
    config: Any = model.config.vision_config
    processor_sizes = (patching.edge, patching.merge, patching.frames)
    tower_sizes = (config.patch_size, config.spatial_merge_size, config.temporal_patch_size)
    if processor_sizes != tower_sizes:
        raise ModelError(
            f"the image processor has patch_size, merge_size and temporal_patch_size {processor_sizes}, the vision "
            f"tower takes {tower_sizes}: set them to that"
        )


def _full_attention_layers(config: Any) -> set[int]:
    """Layers with attention over the whole image; in a tower without windows all of them."""
    return set(getattr(config, "fullatt_block_indexes", range(config.depth))) & set(range(config.depth))


class PatchGraph(torch.nn.Module):
    """``(pixel_values, patch_positions, ...) -> image_embeds`` of one image: tower and merger.

    The model itself sorts patches by window, and sorts its output back. Here each layer with windows gathers its own
    patches; between layers the patches stay in order.
    """

    def __init__(self, model: Any) -> None:
        """``model``: a model of a supported class, in float32."""
        super().__init__()
        self.tower = model.base_model.visual
        self.heads = self.tower.config.num_heads
        self.full_attention = _full_attention_layers(self.tower.config)

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_positions: torch.Tensor,
        window_patches: torch.Tensor | None = None,
        patch_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings of shape ``(pieces, d)``.

        Args:
            pixel_values: shape ``(patches, numbers)``.
            patch_positions: as ``adalink.runtime.storage.vision_schema.PatchTower.inputs`` returns them.
            window_patches: likewise, for a tower with windows.
            patch_indices: likewise, for a tower with windows; the graph's input ``patch_places``.
        """
        first = self.tower.patch_embed.proj  # a convolution whose steps do not overlap: one product
        x = functional.linear(pixel_values, first.weight.flatten(1), first.bias)
        rotary = self.tower.rotary_pos_emb(x, patch_positions)
        for index, block in enumerate(self.tower.blocks):
            windows = None if index in self.full_attention else window_patches
            x = x + self._attend(block.attn, block.norm1(x), rotary, windows, patch_indices)
            x = x + block.mlp(block.norm2(x))
        embeds: torch.Tensor = self.tower.merger(x)
        return embeds

    def _attend(
        self, layer: Any, x: torch.Tensor, rotary: Any, windows: torch.Tensor | None, indices: torch.Tensor | None
    ) -> torch.Tensor:
        """One layer's attention over ``(patches, width)``."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        query, key, value = layer.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
        mask = None
        if windows is None:
            parts = [part.unsqueeze(0) for part in (query, key, value)]
        else:
            parts = [part[windows.clamp(min=0)] for part in (query, key, value)]
            mask = torch.where(windows < 0, torch.tensor(MASKED), torch.tensor(0.0))[:, None, None, :]
        # Shapes (windows, heads, positions, head_dim), and back to (windows, positions, heads, head_dim).
        query, key, value = (part.transpose(1, 2) for part in parts)
        attended, _ = plain_attention(layer, query, key, value, mask, scaling=layer.scaling)
        attended = attended.flatten(0, 1).flatten(1)
        return layer.proj(attended if windows is None else attended[indices])  # type: ignore[no-any-return]


def traced_patch_graph(model: PreTrainedModel) -> TracedGraph:
    """The vision graph to trace."""
    tower, config = describe_patch_tower(model), model.config.vision_config
    grid_inputs = {name: torch.from_numpy(values) for name, values in tower.inputs(_EXAMPLE).items()}
    count = _EXAMPLE[0] * _EXAMPLE[1] * tower.merge**2
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    axes = {"pixel_values": {0: "patches"}, "patch_positions": {0: "patches"}, "image_embeds": {0: "pieces"}}
    if tower.window is not None:
        axes |= {"window_patches": {0: "windows"}, "patch_places": {0: "patches"}}
    return TracedGraph(PatchGraph(model), {"pixel_values": pixels, **grid_inputs}, ["image_embeds"], axes)
