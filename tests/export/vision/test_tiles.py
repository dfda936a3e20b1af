"""A model that takes tiles, exported: an engine as if it had no images, and its tower and connector beside it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import torch
from helpers.tiny_models import (
    TILE_EDGE,
    TILE_IMAGE_TOKEN,
    TILE_TOKENS,
    TILE_VOCAB_SIZE,
    idefics3,
    smolvlm,
)
from helpers.tiny_tokenizer import make_tile_tokenizer
from helpers.vision import check_same_engine, clip_processor, idefics3_processor, tile_processor
from transformers import LlamaForCausalLM

from adalink.export.base.export import export_base
from adalink.runtime.errors import ManifestError, ModelError
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest import Vision
from adalink.runtime.storage.manifest_io import encode_manifest, read_manifest
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import base_fingerprint

MODELS = {"idefics3": idefics3, "smolvlm": smolvlm}


def export(model: Any, folder: Path, **settings: Any) -> Any:
    own = {"tokenizer": make_tile_tokenizer(), "image_processor": tile_processor()} | settings
    return export_base(model, folder, **own)


@pytest.mark.parametrize("name", MODELS)
def test_vision_graph_agrees_with_pytorch(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    manifest = export(model, tmp_path)
    assert manifest.base.vision.tokens_per_image == TILE_TOKENS
    exact_model = copy.deepcopy(model).double()
    session = ort.InferenceSession(str(tmp_path / manifest.base.vision.graph))
    for tiles in (1, 2, 10):
        pixels = torch.randn(1, tiles, 3, TILE_EDGE, TILE_EDGE, generator=torch.Generator().manual_seed(tiles))
        with torch.no_grad():
            plain, exact = (
                torch.cat(list(own.get_image_features(pixel_values=pixels.to(own.dtype)).pooler_output)).numpy()
                for own in (model, exact_model)
            )
        limit = 8 * float(np.abs(plain - exact).max())
        (received,) = session.run(["image_embeds"], {"pixel_values": pixels[0].numpy()})
        assert received.dtype == np.float32
        assert received.shape == (tiles, TILE_TOKENS, plain.shape[1])
        assert np.abs(received.reshape(plain.shape) - plain).max() <= limit
        assert limit < 1e-4 * np.abs(plain).max()
        # What the limit must be able to find: patches in the wrong order.
        (turned,) = session.run(["image_embeds"], {"pixel_values": pixels[0].transpose(2, 3).contiguous().numpy()})
        assert np.abs(turned.reshape(plain.shape) - plain).max() > 100 * limit


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_is_that_of_the_language_model_alone(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    text = LlamaForCausalLM(model.config.text_config)
    text.model, text.lm_head = model.model.text_model, model.lm_head
    for target in ("onnxruntime-cpu", "portable"):
        whole = export(model, tmp_path / "whole", target=target)
        alone = export_base(text, tmp_path / "alone", target=target, tokenizer=make_tile_tokenizer())
    check_same_engine(whole, alone)
    assert whole.base.fingerprint == base_fingerprint(model)


def test_manifest_describes_the_image_side(tmp_path: Path) -> None:
    manifest = export(smolvlm(), tmp_path)
    vision = manifest.base.vision
    assert (vision.architecture, manifest.base.architecture) == ("smolvlm", "llama")
    assert (vision.image_token_id, vision.image_size) == (TILE_IMAGE_TOKEN, (TILE_EDGE, TILE_EDGE))
    assert [len(row) for row in vision.tiles.before_tile] == [3, 3, 3]
    verify_files(tmp_path, manifest, vision.all_files)
    assert read_manifest(tmp_path) == manifest


def test_a_manifest_of_before_there_were_tiles_is_read() -> None:
    before = {"architecture": "llava", "graph": "g", "files": ["g"], "preprocessor": "p", "image_size": [24, 24]}
    vision = msgspec.convert(before | {"image_token_id": 5, "tokens_per_image": 9}, Vision)
    assert vision.tiles is None
    assert vision.image_tokens((0, 0)) == [5] * 9


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_brings_its_own_processor_and_tokenizer(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    MODELS[name]().save_pretrained(source)
    make_tile_tokenizer().save_pretrained(source)
    with pytest.raises(ModelError, match=r"no image processor was found: put preprocessor_config.json beside"):
        export_base(source, tmp_path / "out")
    (idefics3_processor if name == "idefics3" else tile_processor)().save_pretrained(source)
    manifest = export_base(source, tmp_path / "out")
    assert manifest.base.vision == export(MODELS[name](), tmp_path / "again").base.vision


def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its tokenizer, which knows the tokens around them, was not found"):
        export(smolvlm(), tmp_path, tokenizer=None)
    with pytest.raises(ModelError, match="image processor CLIPImageProcessor is not supported; expected one of Idef"):
        export(smolvlm(), tmp_path, image_processor=clip_processor())
    with pytest.raises(ModelError, match="SmolVLMModel has no language model head; expected one of LlavaForCond"):
        export(smolvlm().model, tmp_path)
    with pytest.raises(ModelError, match=f"image_token_id is {TILE_VOCAB_SIZE} and the embedding table has"):
        export(smolvlm(image_token_id=TILE_VOCAB_SIZE), tmp_path)
    model = idefics3()
    with (
        attach(model, AdaLinkConfig(rank=2, modalities=("image",))),
        pytest.raises(ModelError, match=r"the (input embedding|projector) of this Idefics3.* has a hook"),
    ):
        export(model, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("$.base.vision.tiles", {"end": (TILE_VOCAB_SIZE,)}),
        ("$.base.vision.tiles", {"before_whole": (98, TILE_IMAGE_TOKEN)}),
        ("$.base.vision.tiles.before_tile", {"before_tile": (((98,), (98,)),)}),
    ],
)
def test_wrong_tile_tokens_are_named_by_their_field(field: str, change: dict[str, Any], tmp_path: Path) -> None:
    manifest = export(smolvlm(), tmp_path)
    vision = manifest.base.vision
    vision = msgspec.structs.replace(vision, tiles=msgspec.structs.replace(vision.tiles, **change))
    with pytest.raises(ManifestError) as caught:
        encode_manifest(msgspec.structs.replace(manifest, base=msgspec.structs.replace(manifest.base, vision=vision)))
    assert caught.value.field == field
