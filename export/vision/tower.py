"""Vision-language models in two graphs: the language model for the engine, vision tower and projector apart.

Both halves are the model's own modules; nothing is copied or changed. The manifest holds the placeholder token and how
many positions an image takes up. The preprocessor beside the graph says how an image becomes pixel values.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from adalink.export.tracing.graph import TracedGraph
from adalink.export.vision.image_processor import describe_processor
from adalink.export.vision.patches import (
    check_embeddings_suffice,
    check_patching,
    describe_patch_tower,
    empty_decoder,
    traced_patch_graph,
)
from adalink.runtime.errors import ModelError
from adalink.runtime.storage.manifest import Vision
from adalink.training.models.prefix_lm import prompt_form
from adalink.training.models.tiles import read_tile_tokens
from adalink.training.models.vision import SUPPORTED, ImageSide, image_side, takes_images

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

    from adalink.export.writer import DeploymentWriter
    from adalink.runtime.vision.preprocess import Preprocessor
    from adalink.training.models.stand_ins import StandIns

FOLDER = "base/vision"
# Vision towers with a fixed size of image or tile.
_TOWERS = ("clip_vision_model", "siglip_vision_model", "idefics3_vision", "smolvlm_vision", "efficientnet")
_BATCH = 2


def supported_side(model: PreTrainedModel) -> ImageSide:
    """The image side of a model that takes images; raises ``ModelError`` if its way is not supported."""
    side = image_side(model)
    if side is None:
        raise ModelError(
            f"{type(model).__name__} (model type {model.config.model_type!r}) takes images in a way that is not "
            f"supported; of the models that do, only {SUPPORTED} can be exported"
        )
    return side


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The language model of a vision-language model, as a class with a head; any other model unchanged.

    Raises:
        ModelError: the model takes images in a way that is not supported, or transformers has no class with a head
            for its language model.
    """
    if not takes_images(model):
        return model
    name = type(model).__name__
    side = supported_side(model)
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name} has no language model head; expected one of {SUPPORTED}")
    check_embeddings_suffice(model)
    inner = side.language_model
    try:
        with torch.device("meta"):
            outer = empty_decoder(inner.config)
    except ValueError as error:
        raise ModelError(f"the language model of this {name} is no decoder that transformers knows: {error}") from error
    outer.config = inner.config
    setattr(outer, outer.base_model_prefix, inner)
    outer.set_output_embeddings(model.get_output_embeddings())
    outer.generation_config = model.generation_config
    outer.name_or_path = model.name_or_path
    if missing := [name for name, parameter in outer.named_parameters() if parameter.is_meta]:
        raise ModelError(
            f"{type(outer).__name__} has {missing[0]!r}, which this {type(model).__name__} does not: it cannot "
            "be exported"
        )
    return outer.eval()


class VisionGraph(torch.nn.Module):
    """``pixel_values -> image_embeds``: vision tower, feature selection and projector, as the model calls them."""

    def __init__(self, model: Any) -> None:
        """``model``: a LLaVA-like model that computes attention with ``adalink.export.tracing.attention``."""
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Shapes: ``(images, 3, height, width)`` to ``(images, tokens, d)``."""
        # The model returns images one by one, as a list; the projector's output is the same as one tensor.
        outputs: list[Any] = []
        side = supported_side(self.model)
        handle = side.projector.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            self.model.base_model.get_image_features(pixel_values=pixel_values)
        finally:
            handle.remove()
        embeds: torch.Tensor = outputs[0]
        return embeds


class TileGraph(torch.nn.Module):
    """``pixel_values -> image_embeds`` of a model that takes tiles: vision tower and connector, without padding.

    Without padding every tile has the same positions, and no mask is needed. The model's own code looks them up once:
    it compares fractions for equality, which another runtime may round differently. The model drops tiles that are
    all zero as padding; here they are tiles like any other.
    """

    positions: torch.Tensor

    def __init__(self, model: Any, edge: int) -> None:
        """``model``: as for ``VisionGraph``; ``edge``: height and width of a tile."""
        super().__init__()
        self.tower, self.connector = model.base_model.vision_model, model.base_model.connector
        embeddings, outputs = self.tower.embeddings, []
        patches = edge // embeddings.patch_size
        handle = embeddings.position_embedding.register_forward_hook(
            lambda module, args, output: outputs.append(output)
        )
        try:
            with torch.no_grad():
                embeddings(torch.zeros(1, 3, edge, edge), torch.ones(1, patches, patches, dtype=torch.bool))
        finally:
            handle.remove()
        self.register_buffer("positions", outputs[0])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Shapes: ``(tiles, 3, edge, edge)`` to ``(tiles, tokens, d)``."""
        patches = self.tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        states = self.tower.encoder(inputs_embeds=patches + self.positions).last_hidden_state
        embeds: torch.Tensor = self.connector(self.tower.post_layernorm(states))
        return embeds


def _graph_of(model: PreTrainedModel, edge: int) -> torch.nn.Module:
    side = supported_side(model)
    return TileGraph(model, edge) if side.takes_tiles else VisionGraph(model)


def describe_images(
    model: PreTrainedModel, processor: BaseImageProcessor | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Vision, Preprocessor]:
    """The manifest's entry for a model's image side, and its image preprocessing.

    Args:
        model: a model of a supported class, in float32.
        processor: its image processor.
        tokenizer: its tokenizer, with the tokens around tiles and those of every prompt.

    Raises:
        ModelError: the vision tower, the processor or the tokenizer is missing or not supported.
    """
    side = supported_side(model)
    vision = _describe_patches(model) if side.takes_patches else _describe_tower(model)
    preprocessor = describe_processor(
        processor, vision.image_size, takes_tiles=side.takes_tiles, takes_patches=side.takes_patches
    )
    if preprocessor.patching is not None:
        check_patching(model, preprocessor.patching)
    if preprocessor.tiling is not None:
        tiles = read_tile_tokens(tokenizer, preprocessor.tiling, vision.image_token_id, vision.tokens_per_image)
        vision = msgspec.structs.replace(vision, tiles=tiles)
    if tokenizer is not None:
        vision = msgspec.structs.replace(vision, prompt_form=prompt_form(model, tokenizer))
    return vision, preprocessor


def _describe_tower(model: PreTrainedModel) -> Vision:
    config = model.config
    tower = config.vision_config
    if tower.model_type not in _TOWERS:
        raise ModelError(
            f"the vision tower of this {type(model).__name__} is a {tower.model_type!r}, whose images have no one "
            f"size; supported are {', '.join(_TOWERS)}"
        )
    size = (tower.image_size, tower.image_size)
    with torch.no_grad():
        tokens = _graph_of(model, tower.image_size)(torch.zeros(1, 3, *size)).shape[1]
    return _describe(model, image_size=size, tokens_per_image=tokens)


def _describe_patches(model: PreTrainedModel) -> Vision:
    """The entry of a model that takes patches: a piece of an image becomes one position."""
    tower = describe_patch_tower(model)
    edge = tower.merge * model.config.vision_config.patch_size
    return _describe(model, image_size=(edge, edge), tokens_per_image=1, patches=tower)


def _describe(model: PreTrainedModel, **size: Any) -> Vision:
    """The manifest's entry; raises ``ModelError`` if the image token is not in the vocabulary."""
    config, graph = model.config, f"{FOLDER}/model.onnx"
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not 0 <= config.image_token_id < vocabulary:
        raise ModelError(
            f"image_token_id is {config.image_token_id} and the embedding table has {vocabulary} rows: resize the "
            "embeddings of this checkpoint to hold the image token"
        )
    return Vision(
        architecture=config.model_type,
        graph=graph,
        files=(graph, f"{graph}.data"),
        preprocessor=f"{FOLDER}/preprocessor.json",
        image_token_id=config.image_token_id,
        **size,
    )


def write_vision(
    writer: DeploymentWriter,
    vision: Vision,
    model: PreTrainedModel,
    preprocessor: Preprocessor,
    metadata: dict[str, str],
    stand_ins: StandIns,
) -> None:
    """Write the vision graph and its preprocessor; ``stand_ins`` are those of the language model."""
    from adalink.export.tracing.attention import exportable_attention
    from adalink.export.tracing.graph import write_graph

    writer.stage(vision.preprocessor).write_bytes(msgspec.json.format(msgspec.json.encode(preprocessor), indent=2))
    graph = traced_patch_graph(model) if vision.patches is not None else _traced_graph(model, vision)
    with exportable_attention(model):
        write_graph(dataclasses.replace(graph, stand_ins=stand_ins), writer.stage(vision.graph), metadata)


def _traced_graph(model: PreTrainedModel, vision: Vision) -> TracedGraph:
    example = torch.randn(_BATCH, 3, *vision.image_size, generator=torch.Generator().manual_seed(0))
    axes = {"pixel_values": {0: "images"}, "image_embeds": {0: "images", 1: "tokens"}}
    return TracedGraph(_graph_of(model, vision.image_size[0]), {"pixel_values": example}, ["image_embeds"], axes)
