"""A model that takes images, exported: an engine as if it had no images, and the vision tower beside it, unmodified."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import torch
from helpers.tiny_models import IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS, _fill, fast_vlm, llama, llava
from helpers.tiny_tokenizer import make_tokenizer
from helpers.vision import check_same_engine, clip_processor, llava_processor, siglip_processor

from adalink.export.base.export import export_base
from adalink.runtime.errors import ContractError, ManifestError, ModelError
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest_io import encode_manifest, read_manifest
from adalink.runtime.vision.preprocess import read_preprocessor
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import base_fingerprint


def siglip() -> Any:
    """No class token, every position kept, and a head that LLaVA does not use."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=8
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=llava().config.text_config,
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in name:
                parameter.zero_()
    return _fill(model, 21)


MODELS = {
    "clip": (llava, IMAGE_TOKENS),
    "clip, with its class token": (lambda: llava(vision_feature_select_strategy="full"), IMAGE_TOKENS + 1),
    "clip, of two layers": (lambda: llava(vision_feature_layer=[-2, 1]), IMAGE_TOKENS),
    "siglip": (siglip, IMAGE_TOKENS),
    "efficientnet": (fast_vlm, IMAGE_TOKENS),
}


def encode(folder: Path, pixels: torch.Tensor) -> np.ndarray:
    session = ort.InferenceSession(str(folder / "base" / "vision" / "model.onnx"))
    (embeds,) = session.run(["image_embeds"], {"pixel_values": pixels.numpy()})
    return embeds


def reference(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))


@pytest.mark.parametrize("name", MODELS)
def test_vision_graph_agrees_with_pytorch(name: str, tmp_path: Path) -> None:
    make, tokens = MODELS[name]
    model = make()
    manifest = export_base(model, tmp_path, image_processor=clip_processor())
    assert manifest.base.vision.tokens_per_image == tokens
    exact_model = copy.deepcopy(model).double()
    for images in (1, 2, 5):
        pixels = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(images))
        plain, exact = reference(model, pixels), reference(exact_model, pixels.double())
        # As `helpers.export.yardstick`: eight times what PyTorch itself is away from float64.
        limit = 8 * float((plain - exact).abs().max())
        received = encode(tmp_path, pixels)
        assert received.dtype == np.float32
        assert received.shape == plain.shape
        assert np.abs(received - plain.numpy()).max() <= limit
        assert limit < 1e-4 * float(plain.abs().max())
        # What the limit must be able to find: features of the layer beside the right one, or of a neighbour.
        other = copy.deepcopy(model)
        other.config.vision_feature_layer = 1
        if name.startswith("clip") and "two" not in name:
            assert np.abs(reference(other, pixels).numpy() - received).max() > 100 * limit


def test_the_engine_is_that_of_the_language_model_alone(tmp_path: Path) -> None:
    model = llava()
    text = llama()
    text.model, text.lm_head = model.model.language_model, model.lm_head
    text.config = model.config.text_config
    for target in ("onnxruntime-cpu", "portable"):
        whole = export_base(
            model, tmp_path / "whole", target=target, tokenizer=make_tokenizer(), image_processor=clip_processor()
        )
        alone = export_base(text, tmp_path / "alone", target=target, tokenizer=make_tokenizer())
    check_same_engine(whole, alone)
    assert whole.base.fingerprint == base_fingerprint(model)


def test_manifest_describes_the_image_side(tmp_path: Path) -> None:
    manifest = export_base(llava(), tmp_path, image_processor=clip_processor(resample=2))
    vision = manifest.base.vision
    assert (vision.architecture, manifest.base.architecture) == ("llava", "llama")
    assert (vision.image_token_id, vision.tokens_per_image) == (IMAGE_TOKEN, IMAGE_TOKENS)
    assert vision.image_size == (IMAGE_SIZE, IMAGE_SIZE)
    verify_files(tmp_path, manifest, vision.all_files)
    own = read_preprocessor((tmp_path / vision.preprocessor).read_bytes(), "preprocessor.json")
    assert (own.shortest_edge, own.crop, own.resample) == (IMAGE_SIZE, (IMAGE_SIZE, IMAGE_SIZE), 2)
    on_disk = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert on_disk == {*manifest.files, "manifest.json", ".lock"}


def test_the_vision_graph_is_float32_whatever_the_base(tmp_path: Path) -> None:
    for dtype in ("float32", "float16"):
        manifest = export_base(llava(), tmp_path / dtype, dtype=dtype, image_processor=clip_processor())
    assert manifest.base.embedding_dtype == "float16"
    for file in ("model.onnx", "model.onnx.data"):
        paths = [tmp_path / dtype / "base" / "vision" / file for dtype in ("float32", "float16")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_another_variant_leaves_the_vision_graph_alone(tmp_path: Path) -> None:
    model = llava()
    first = export_base(model, tmp_path, image_processor=clip_processor())
    path = tmp_path / first.base.vision.graph
    before = path.stat()
    second = export_base(model, tmp_path, target="portable", image_processor=clip_processor())
    assert second.base == first.base
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with pytest.raises(ContractError, match="with vision Vision"):
        export_base(llava(vision_feature_select_strategy="full"), tmp_path, image_processor=clip_processor())
    for other in (clip_processor(image_std=[0.5, 0.5, 0.5]), clip_processor(resample=2)):
        with pytest.raises(ContractError, match="with another image processor than"):
            export_base(model, tmp_path, image_processor=other, replace=True)
    assert read_manifest(tmp_path) == second


def test_a_checkpoint_brings_its_own_processor(tmp_path: Path) -> None:
    model, source = llava(), tmp_path / "source"
    model.save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    with pytest.raises(ModelError, match=r"no image processor was found: put preprocessor_config.json beside"):
        export_base(source, tmp_path / "out")
    llava_processor().save_pretrained(source)
    manifest = export_base(source, tmp_path / "out")
    own = read_preprocessor((tmp_path / "out" / manifest.base.vision.preprocessor).read_bytes(), "")
    assert own.pad_color == (122, 116, 104)
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(encode(tmp_path / "out", pixels), reference(model, pixels), atol=1e-4)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (None, "no image processor was found"),
        (clip_processor(32), r"gives pictures of \(32, 32\), the vision tower takes \(24, 24\): set its crop_size"),
        (clip_processor(do_center_crop=False), "gives pictures of any size"),
        (siglip_processor(20), r"gives pictures of \(20, 20\)"),
        (clip_processor(size={"shortest_edge": 24, "longest_edge": 40}), "expected a shortest_edge"),
        (clip_processor(do_pad=True), "pads"),
        (clip_processor(resample=None), "names no filter: set its resample, to 2"),
        (
            make_tokenizer(),
            "image processor TokenizersBackend is not supported; expected one of CLIP",
        ),
    ],
)
def test_a_processor_that_does_not_fit_is_refused(processor: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        export_base(llava(), tmp_path, image_processor=processor)
    assert not (tmp_path / "manifest.json").exists()


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, PixtralVisionConfig

    tiny = llava().config
    config = LlavaOnevisionConfig(
        vision_config=tiny.vision_config, text_config=tiny.text_config, image_token_index=36, video_token_index=37
    )
    with pytest.raises(ModelError, match=r"LlavaOnevisionForConditionalGeneration .* only LlavaForCond"):
        export_base(LlavaOnevisionForConditionalGeneration(config), tmp_path)
    with pytest.raises(ModelError, match="LlavaModel has no language model head"):
        export_base(llava().model, tmp_path)
    pixtral = PixtralVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
    )
    model = type(llava())(type(tiny)(vision_config=pixtral, text_config=tiny.text_config, image_token_index=36))
    with pytest.raises(ModelError, match="is a 'pixtral', whose pictures have no one size"):
        export_base(model, tmp_path, image_processor=clip_processor())


def test_an_image_token_outside_the_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="image_token_id is 96 and the embedding table has 96 rows"):
        export_base(llava(image_token_index=96), tmp_path, image_processor=clip_processor())


def test_an_attached_image_adapter_is_not_exported(tmp_path: Path) -> None:
    model = llava()
    with (
        attach(model, AdaLinkConfig(rank=2, modalities=("image",))),
        pytest.raises(ModelError, match=r"the (input embedding|projector) of this Llava.* has a hook"),
    ):
        export_base(model, tmp_path, image_processor=clip_processor())
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ModelError, match="the projector of this LlavaForConditionalGeneration has a hook"):
        export_base(model, tmp_path, image_processor=clip_processor())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("$.base.vision.image_token_id", {"image_token_id": 96}),
        ("$.base.vision.image_token_id", {"image_token_id": 0}),
        ("$.base.vision.tokens_per_image", {"tokens_per_image": 0}),
        ("$.base.vision.image_size", {"image_size": (24, 0)}),
        ("$.base.vision.files", {"files": ("base/vision/model.onnx.data",)}),
        ("$.files['base/vision/other.json']", {"preprocessor": "base/vision/other.json"}),
    ],
)
def test_a_wrong_image_side_is_named_by_its_field(field: str, value: dict[str, Any], tmp_path: Path) -> None:
    manifest = export_base(llava(), tmp_path, image_processor=clip_processor())
    vision = msgspec.structs.replace(manifest.base.vision, **value)
    with pytest.raises(ManifestError) as caught:
        encode_manifest(msgspec.structs.replace(manifest, base=msgspec.structs.replace(manifest.base, vision=vision)))
    assert caught.value.field == field
