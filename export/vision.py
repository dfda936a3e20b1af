"""A model that takes images, taken apart: its language model for the engine, its vision tower and projector apart.

Both halves are the model's own modules; nothing is copied or changed. Which token stands for an image, how many
positions one takes up and how a picture becomes pixel values is written down beside the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import torch

from adalink.export.architectures import architecture_of
from adalink.export.onnx_graph import TracedGraph
from adalink.runtime.errors import ModelError
from adalink.runtime.manifest import Vision
from adalink.runtime.preprocess import Preprocessor
from adalink.training.vision import image_side, takes_images

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

    from adalink.export.writer import DeploymentWriter

FOLDER = "base/vision"
# Vision towers with one size of picture, and the image processors whose steps `Preprocessor` has.
_TOWERS = ("clip_vision_model", "siglip_vision_model")
_PROCESSORS = ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")
_BATCH = 2


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The language model inside a LLaVA-like one, as its own class with a head; any other model as it is.

    Raises:
        ModelError: the model takes images in a way that is not supported, or its language model is no decoder with a
            head of its own.
    """
    from transformers import AutoModelForCausalLM

    if not takes_images(model):
        return model
    name = type(model).__name__
    if image_side(model) is None:
        raise ModelError(
            f"{name} (model type {model.config.model_type!r}) takes images in a way that is not supported; of the "
            "models that do, only LlavaForConditionalGeneration can be exported"
        )
    if model.get_output_embeddings() is None:
        raise ModelError(f"{name} has no language model head; expected LlavaForConditionalGeneration")
    inner = model.base_model.language_model
    try:
        with torch.device("meta"):
            outer = AutoModelForCausalLM.from_config(inner.config)
    except ValueError as error:
        raise ModelError(f"the language model of this {name} is no decoder that transformers knows: {error}") from error
    outer.config = inner.config
    setattr(outer, outer.base_model_prefix, inner)
    outer.set_output_embeddings(model.get_output_embeddings())
    outer.generation_config = model.generation_config
    if left := [key for key, parameter in outer.named_parameters() if parameter.is_meta]:
        raise ModelError(f"{type(outer).__name__} has {left[0]!r}, which this {name} does not: it cannot be exported")
    architecture_of(outer)
    return outer.eval()


class VisionGraph(torch.nn.Module):
    """``pixel_values -> image_embeds``: vision tower, feature selection and projector, as the model calls them."""

    def __init__(self, model: Any) -> None:
        """``model``: LLaVA-like, computing attention with ``adalink.export.attention``."""
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Shapes: ``(images, 3, height, width)`` to ``(images, tokens, d)``."""
        # The model hands the images out one by one, as a list; what the projector gave is the same as one tensor.
        given: list[torch.Tensor] = []
        side = image_side(self.model)
        assert side is not None
        handle = side.projector.register_forward_hook(lambda module, args, output: given.append(output))
        try:
            self.model.base_model.get_image_features(pixel_values=pixel_values)
        finally:
            handle.remove()
        return given[0]


def describe_vision(model: PreTrainedModel) -> Vision:
    """What the manifest says of the image side of a LLaVA-like model; raises ``ModelError``."""
    config = model.config
    tower = config.vision_config
    if tower.model_type not in _TOWERS:
        raise ModelError(
            f"the vision tower of this {type(model).__name__} is a {tower.model_type!r}, whose pictures have no one "
            f"size; supported are {', '.join(_TOWERS)}"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not 0 <= config.image_token_id < vocabulary:
        raise ModelError(
            f"image_token_id is {config.image_token_id} and the embedding table has {vocabulary} rows: resize the "
            "embeddings of this checkpoint to hold the image token"
        )
    size = (tower.image_size, tower.image_size)
    with torch.no_grad():
        tokens = VisionGraph(model)(torch.zeros(1, 3, *size)).shape[1]
    graph = f"{FOLDER}/model.onnx"
    return Vision(
        architecture=config.model_type,
        graph=graph,
        files=(graph, f"{graph}.data"),
        preprocessor=f"{FOLDER}/preprocessor.json",
        image_size=size,
        image_token_id=config.image_token_id,
        tokens_per_image=tokens,
    )


def describe_processor(processor: BaseImageProcessor | None, vision: Vision) -> Preprocessor:
    """The steps of an image processor.

    Raises:
        ModelError: there is none, it has other steps, or it does not give what the vision tower takes.
    """
    if processor is None:
        raise ModelError(
            "this model takes images and no image processor was found: put preprocessor_config.json beside the "
            "checkpoint, or pass image_processor="
        )
    name = type(processor).__name__.removesuffix("Fast").removesuffix("Pil")
    if name not in _PROCESSORS:
        raise ModelError(f"image processor {name} is not supported; expected one of {', '.join(_PROCESSORS)}")
    values = processor.to_dict()
    size, crop = dict(values["size"]), dict(values.get("crop_size") or {})
    edge, sides = size.get("shortest_edge"), (size.get("height"), size.get("width"))
    resizes, crops = bool(values.get("do_resize")), bool(values.get("do_center_crop"))
    if resizes and (size.get("longest_edge") or (edge is None and None in sides)):
        raise ModelError(f"image processor {name} resizes to {size}; expected a shortest_edge, or a height and width")
    pads = bool(values.get("do_pad"))
    if pads and name != "LlavaImageProcessor":
        raise ModelError(f"image processor {name} pads (do_pad), which only LlavaImageProcessor is known to do")
    normalizes = bool(values.get("do_normalize"))
    red, green, blue = values["image_mean"]
    own = Preprocessor(
        pad_color=(int(red * 255), int(green * 255), int(blue * 255)) if pads else None,
        shortest_edge=edge if resizes else None,
        resize=None if not resizes or edge is not None else (int(size["height"]), int(size["width"])),
        resample=int(values["resample"]),
        crop=(int(crop["height"]), int(crop["width"])) if crops else None,
        rescale_factor=values["rescale_factor"] if values.get("do_rescale") else None,
        mean=(red, green, blue) if normalizes else None,
        std=tuple(values["image_std"]) if normalizes else None,
    )
    given = own.crop or own.resize or ((edge, edge) if pads and resizes else None)
    if given != vision.image_size:
        raise ModelError(
            f"image processor {name} gives pictures of {given or 'any size'}, the vision tower takes "
            f"{vision.image_size}: set its crop_size to that"
        )
    return own


def write_vision(
    writer: DeploymentWriter,
    vision: Vision,
    model: PreTrainedModel,
    preprocessor: Preprocessor,
    metadata: dict[str, str],
) -> None:
    """Write the vision graph and its preprocessor."""
    from adalink.export.attention import exportable_attention
    from adalink.export.onnx_graph import write_graph

    writer.stage(vision.preprocessor).write_bytes(msgspec.json.format(msgspec.json.encode(preprocessor), indent=2))
    example = torch.randn(_BATCH, 3, *vision.image_size, generator=torch.Generator().manual_seed(0))
    axes = {"pixel_values": {0: "images"}, "image_embeds": {0: "images", 1: "tokens"}}
    graph = TracedGraph(VisionGraph(model), {"pixel_values": example}, ["image_embeds"], axes)
    with exportable_attention(model):
        write_graph(graph, writer.stage(vision.graph), metadata)


def find_image_processor(spec: str | Path) -> BaseImageProcessor | None:
    """Image processor of a checkpoint, in its PIL form; ``None`` if it has none."""
    import PIL  # noqa: F401  # the command line names the extra of a module that is missing
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(str(spec), backend="pil", trust_remote_code=False)
    except (OSError, ValueError):
        return None
