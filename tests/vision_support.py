"""Image processors for the tiny models that take images."""

from __future__ import annotations

from typing import Any

from tiny_models import IMAGE_SIZE
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil


def clip_processor(edge: int = IMAGE_SIZE, **settings: Any) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        **({"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}} | settings)
    )


def llava_processor(edge: int = IMAGE_SIZE, **settings: Any) -> LlavaImageProcessorPil:
    square = {"height": edge, "width": edge}
    return LlavaImageProcessorPil(**({"size": {"shortest_edge": edge}, "crop_size": square, "do_pad": True} | settings))


def siglip_processor(edge: int = IMAGE_SIZE, **settings: Any) -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(**({"size": {"height": edge, "width": edge}} | settings))
