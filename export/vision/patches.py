"""The vision tower of a model that takes a picture as patches in the grid of its own shape, as one graph for all grids.

What depends on the grid alone, where patches are and which of them attend to each other, is the graph's input: numpy
makes it (``adalink.runtime.vision.patches``), so that nothing of it is traced. The tower's own layers are traced as
they are.
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

# What such a model's language model is, beside the axes of its positions: their modules have the same names.
_TEXT_MODELS = {"qwen2_vl_text": "Qwen2ForCausalLM", "qwen2_5_vl_text": "Qwen2ForCausalLM"}
# Of the picture that is traced: rows and columns of pieces that fill no whole number of windows.
_EXAMPLE = (3, 5)


def empty_decoder(config: PretrainedConfig) -> PreTrainedModel:
    """A language model with a head, of the class that a config of a model's inner part belongs to.

    Raises:
        ValueError: there is none.
    """
    import transformers

    if config.model_type not in _TEXT_MODELS:
        found: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
        return found
    decoder: PreTrainedModel = getattr(transformers, _TEXT_MODELS[config.model_type])(config)
    return decoder


def check_embeddings_suffice(model: PreTrainedModel) -> None:
    """Check that a model's pictures reach its language model as embeddings alone; raises ``ModelError``."""
    if layers := getattr(model.config.vision_config, "deepstack_visual_indexes", None):
        raise ModelError(
            f"this {type(model).__name__} cannot be exported behind inputs_embeds: layers {list(layers)} of its vision "
            "tower also hand their states to the first layers of its language model (deepstack); adapters can be "
            "attached to it and trained, and Qwen2.5-VL can be exported"
        )


def describe_patch_tower(model: PreTrainedModel) -> PatchTower:
    """How the tower of a supported model looks at patches."""
    config: Any = model.config.vision_config
    window = None
    if _whole_layers(config) < set(range(config.depth)):
        window = config.window_size // config.spatial_merge_size // config.patch_size
    return PatchTower(merge=config.spatial_merge_size, window=window)


def check_patching(model: PreTrainedModel, patching: Patching) -> None:
    """Check that pictures are cut into the patches that a supported model's tower takes; raises ``ModelError``."""
    config: Any = model.config.vision_config
    given = (patching.edge, patching.merge, patching.frames)
    taken = (config.patch_size, config.spatial_merge_size, config.temporal_patch_size)
    if given != taken:
        raise ModelError(
            f"the image processor has patch_size, merge_size and temporal_patch_size {given}, the vision tower takes "
            f"{taken}: set them to that"
        )


def _whole_layers(config: Any) -> set[int]:
    """The layers that look at the whole picture: of a tower without windows all of them."""
    return set(getattr(config, "fullatt_block_indexes", range(config.depth))) & set(range(config.depth))


class PatchGraph(torch.nn.Module):
    """``(pixel_values, patch_positions, ...) -> image_embeds`` of one picture: tower and merger.

    The model puts patches in the order of its windows and what it merged back into theirs. Here each layer with
    windows picks its own; between layers patches stay where they were.
    """

    def __init__(self, model: Any) -> None:
        """``model``: of a supported class, in float32."""
        super().__init__()
        self.tower = model.base_model.visual
        self.heads = self.tower.config.num_heads
        self.whole = _whole_layers(self.tower.config)

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_positions: torch.Tensor,
        window_patches: torch.Tensor | None = None,
        patch_places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings of shape ``(pieces, d)``.

        Args:
            pixel_values: shape ``(patches, numbers)``.
            patch_positions: as ``adalink.runtime.storage.vision_schema.PatchTower.inputs`` gives them; likewise
            window_patches: of a tower with windows.
            patch_places: of a tower with windows.
        """
        first = self.tower.patch_embed.proj  # a convolution whose steps do not overlap: one product
        x = functional.linear(pixel_values, first.weight.flatten(1), first.bias)
        turn = self.tower.rotary_pos_emb(x, patch_positions)
        for index, block in enumerate(self.tower.blocks):
            windows = None if index in self.whole else window_patches
            x = x + self._attend(block.attn, block.norm1(x), turn, windows, patch_places)
            x = x + block.mlp(block.norm2(x))
        embeds: torch.Tensor = self.tower.merger(x)
        return embeds

    def _attend(
        self, layer: Any, x: torch.Tensor, turn: Any, windows: torch.Tensor | None, places: torch.Tensor | None
    ) -> torch.Tensor:
        """One layer's attention over ``(patches, width)``."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        query, key, value = layer.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *turn)
        mask = None
        if windows is None:
            parts = [part.unsqueeze(0) for part in (query, key, value)]
        else:
            parts = [part[windows.clamp(min=0)] for part in (query, key, value)]
            mask = torch.where(windows < 0, torch.tensor(MASKED), torch.tensor(0.0))[:, None, None, :]
        # Shapes (windows, heads, places, head_dim), and back to (windows, places, heads, head_dim).
        query, key, value = (part.transpose(1, 2) for part in parts)
        seen, _ = plain_attention(layer, query, key, value, mask, scaling=layer.scaling)
        seen = seen.flatten(0, 1).flatten(1)
        return layer.proj(seen if windows is None else seen[places])  # type: ignore[no-any-return]


def traced_patch_graph(model: PreTrainedModel) -> TracedGraph:
    """The vision graph, to be traced."""
    tower, config = describe_patch_tower(model), model.config.vision_config
    beside = {name: torch.from_numpy(values) for name, values in tower.inputs(_EXAMPLE).items()}
    count = _EXAMPLE[0] * _EXAMPLE[1] * tower.merge**2
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    axes = {"pixel_values": {0: "patches"}, "patch_positions": {0: "patches"}, "image_embeds": {0: "pieces"}}
    if tower.window is not None:
        axes |= {"window_patches": {0: "windows"}, "patch_places": {0: "patches"}}
    return TracedGraph(PatchGraph(model), {"pixel_values": pixels, **beside}, ["image_embeds"], axes)
