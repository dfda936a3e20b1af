"""Image processors for the tiny models that take images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from helpers.tiny_models import IMAGE_SIZE, PATCH_EDGE, PIECE_EDGE, TILE_EDGE
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from adalink.runtime.storage.manifest import Manifest


def clip_processor(edge: int = IMAGE_SIZE, **settings: Any) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        **({"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}} | settings)
    )


def llava_processor(edge: int = IMAGE_SIZE, **settings: Any) -> LlavaImageProcessorPil:
    square = {"height": edge, "width": edge}
    return LlavaImageProcessorPil(**({"size": {"shortest_edge": edge}, "crop_size": square, "do_pad": True} | settings))


def siglip_processor(edge: int = IMAGE_SIZE, **settings: Any) -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(**({"size": {"height": edge, "width": edge}} | settings))


def tile_processor(edge: int = TILE_EDGE, tiles: int = 3, **settings: Any) -> SmolVLMImageProcessorPil:
    """Of SmolVLM's class; ``tiles`` on the longer edge of an image."""
    sizes = {"size": {"longest_edge": tiles * edge}, "max_image_size": {"longest_edge": edge}}
    return SmolVLMImageProcessorPil(**sizes | settings)


def idefics3_processor(edge: int = TILE_EDGE, tiles: int = 3, **settings: Any) -> Idefics3ImageProcessorPil:
    sizes = {"size": {"longest_edge": tiles * edge}, "max_image_size": {"longest_edge": edge}}
    return Idefics3ImageProcessorPil(**sizes | settings)


def patch_processor(least: int = 4, most: int = 20, **settings: Any) -> Qwen2VLImageProcessorPil:
    """Of the tiny models that take patches: images become ``least`` to ``most`` pieces."""
    size = {"shortest_edge": least * PIECE_EDGE**2, "longest_edge": most * PIECE_EDGE**2}
    return Qwen2VLImageProcessorPil(**({"size": size, "patch_size": PATCH_EDGE} | settings))


def check_same_engine(whole: Manifest, alone: Manifest) -> None:
    """Check that a base that takes images has the engines, table and bank of its language model, byte for byte."""
    assert set(whole.variants) == set(alone.variants)
    for variant in alone.variants.values():
        for path in variant.files:
            assert whole.files[path] == alone.files[path], f"{path} knows of images"
    for path in (alone.base.tokenizer, *alone.base.bank.values()):
        assert whole.files[path] == alone.files[path]
    place: dict[str, Any] = {}
    if alone.base.table is None or alone.base.table.rows_start is None:
        assert whole.files[alone.base.embeddings] == alone.files[alone.base.embeddings]
    else:  # the table is in the data of a variant, whichever was exported first, and these are the same
        place = {"embeddings": whole.base.embeddings, "table": whole.base.table}
        assert Path(whole.base.embeddings).name == "model.onnx.data"
    assert whole.base.weights_digest != alone.base.weights_digest, "it is of the tower too"
    blank: dict[str, Any] = {"name": "", "vision": None, "weights_digest": ""}
    expected = msgspec.structs.replace(alone.base, **blank | place | {"modalities": ("text", "image")})
    assert msgspec.structs.replace(whole.base, **blank) == expected
