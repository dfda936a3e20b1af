"""What an export of a model that takes images says of them, what it takes from a checkpoint, and what it refuses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import torch
from helpers.tiny_models import (
    IMAGE_SIZE,
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    PATCH_EDGE,
    PIECE_EDGE,
    PREFIX_IMAGE_TOKEN,
    TILE_EDGE,
    TILE_IMAGE_TOKEN,
    TILE_TOKENS,
    TILE_VOCAB_SIZE,
    idefics3,
    llava,
    paligemma,
    qwen2_5_vl,
    qwen3_vl,
    smolvlm,
)
from helpers.tiny_tokenizer import make_tokenizer
from helpers.vision import clip_processor, llava_processor, patch_processor, siglip_processor
from helpers.vision_deployments import VisionExports
from helpers.vision_families import FAMILIES, TILES

from adalink.export.base.export import export_base
from adalink.runtime.errors import ConfigError, ContractError, ManifestError, ModelError
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest import Vision
from adalink.runtime.storage.manifest_io import encode_manifest, read_manifest
from adalink.runtime.storage.vision_schema import PatchTower
from adalink.runtime.vision.preprocess import read_preprocessor
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig

SQUARE, TILE, PIECE = (IMAGE_SIZE,) * 2, (TILE_EDGE,) * 2, (PIECE_EDGE,) * 2
# Architectures of the whole and of its language model; placeholder, size of an image and tokens of one.
DESCRIBED = {
    "llava": ("llava", "llama", IMAGE_TOKEN, SQUARE, IMAGE_TOKENS),
    "smolvlm": ("smolvlm", "llama", TILE_IMAGE_TOKEN, TILE, TILE_TOKENS),
    "paligemma": ("paligemma", "gemma", PREFIX_IMAGE_TOKEN, SQUARE, IMAGE_TOKENS),
    "qwen2_vl": ("qwen2_vl", "qwen2_vl_text", IMAGE_TOKEN, PIECE, 1),
    "qwen2_5_vl": ("qwen2_5_vl", "qwen2_5_vl_text", IMAGE_TOKEN, PIECE, 1),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_manifest_describes_the_image_side(vision_exports: VisionExports, name: str) -> None:
    _, folder, manifest = vision_exports[name]
    base, vision = manifest.base, manifest.base.vision
    sizes = (vision.image_token_id, vision.image_size, vision.tokens_per_image)
    assert (vision.architecture, base.architecture, *sizes) == DESCRIBED[name]
    assert base.bidirectional_prompt == (name == "paligemma")
    verify_files(folder, manifest, vision.all_files)
    assert read_manifest(folder) == manifest
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert on_disk == {*manifest.files, "manifest.json", ".lock"}


def test_manifest_describes_tiles_patches_and_the_form_of_prompts(vision_exports: VisionExports) -> None:
    visions = {name: vision_exports[name].manifest.base.vision for name in DESCRIBED}
    assert [len(row) for row in visions["smolvlm"].tiles.before_tile] == [3, 3, 3]
    assert visions["qwen2_5_vl"].patches == PatchTower(merge=2, window=2)
    assert visions["qwen2_5_vl"].image_tokens((2, 3)) == [IMAGE_TOKEN] * 6
    assert visions["qwen2_vl"].patches == PatchTower(merge=2, window=None)
    form = {"image": "<image>", "before": "<bos>", "after": "\n"}
    assert msgspec.to_builtins(visions["paligemma"].prompt_form) == form


@pytest.mark.parametrize("more", [{}, {"tiles": None}], ids=["before tiles", "before patches"])
def test_manifest_of_before_is_read(more: dict[str, None]) -> None:
    before = {"architecture": "llava", "graph": "g", "files": ["g"], "preprocessor": "p", "image_size": [24, 24]}
    vision = msgspec.convert(before | {"image_token_id": 5, "tokens_per_image": 9} | more, Vision)
    assert vision.tiles is vision.patches is None
    assert vision.image_tokens((0, 0)) == [5] * 9


def test_vision_graph_is_float32_whatever_the_base(vision_exports: VisionExports, tmp_path: Path) -> None:
    manifest = FAMILIES["llava"].export(tmp_path, dtype="float16")
    assert manifest.base.embedding_dtype == "float16"
    for file in ("model.onnx", "model.onnx.data"):
        path = Path("base", "vision", file)
        assert (tmp_path / path).read_bytes() == (vision_exports["llava"].folder / path).read_bytes()


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_second_variant_leaves_the_vision_graph_and_the_form_of_prompts_alone(
    vision_exports: VisionExports, name: str, tmp_path: Path
) -> None:
    """Though it brings no tokenizer, which the form of prompts comes from."""
    model, source, made = vision_exports[name]
    folder = shutil.copytree(source, tmp_path / "deployment")
    path = folder / made.base.vision.graph
    before = path.stat()
    second = FAMILIES[name].export(folder, model, target="portable", replace=True, tokenizer=None)
    assert second.base == made.base
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_variant_of_another_image_side_is_refused(vision_exports: VisionExports, tmp_path: Path) -> None:
    model, source, made = vision_exports["llava"]
    folder = shutil.copytree(source, tmp_path / "deployment")
    with pytest.raises(ContractError, match="with vision Vision"):
        FAMILIES["llava"].export(folder, llava(vision_feature_select_strategy="full"), replace=True)
    for other in (clip_processor(image_std=[0.5, 0.5, 0.5]), clip_processor(resample=2)):
        with pytest.raises(ContractError, match="with another image processor than"):
            FAMILIES["llava"].export(folder, model, image_processor=other, replace=True)
    assert read_manifest(folder) == made


@pytest.mark.parametrize("name", ["llava", *TILES, "paligemma", "qwen2_5_vl"])
def test_checkpoint_brings_its_own_processor_and_tokenizer(
    vision_exports: VisionExports, name: str, tmp_path: Path
) -> None:
    source, family = tmp_path / "source", FAMILIES[name]
    family.make_model().save_pretrained(source)
    family.make_tokenizer().save_pretrained(source)
    with pytest.raises(ModelError, match=r"no image processor was found: put preprocessor_config.json beside"):
        export_base(source, tmp_path / "out")
    (llava_processor(resample=2) if name == "llava" else family.make_processor()).save_pretrained(source)
    base = export_base(source, tmp_path / "out").base
    assert (base.name, base.vision) == ("source", vision_exports[name].manifest.base.vision)
    if name == "llava":
        steps = read_preprocessor((tmp_path / "out" / base.vision.preprocessor).read_bytes(), "preprocessor.json")
        assert (steps.pad_color, steps.shortest_edge, steps.crop) == ((122, 116, 104), IMAGE_SIZE, SQUARE)
        assert steps.resample == 2
        pixels = torch.randn(2, 3, *SQUARE, generator=torch.Generator().manual_seed(0))
        session = ort.InferenceSession(str(tmp_path / "out" / base.vision.graph))
        with torch.no_grad():
            expected = torch.stack(list(family.make_model().get_image_features(pixel_values=pixels).pooler_output))
        received = session.run(["image_embeds"], {"pixel_values": pixels.numpy()})[0]
        np.testing.assert_allclose(received, expected, atol=1e-4)


def test_without_a_tokenizer_there_is_no_form_of_prompts(tmp_path: Path) -> None:
    assert FAMILIES["paligemma"].export(tmp_path, tokenizer=None).base.vision.prompt_form is None


def onevision() -> Any:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    tiny = llava().config
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=tiny.vision_config, text_config=tiny.text_config, image_token_index=36, video_token_index=37
        )
    )


def pixtral() -> Any:
    from transformers import PixtralVisionConfig

    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
    )
    tiny = llava()
    text = tiny.config.text_config
    return type(tiny)(type(tiny.config)(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN))


def paligemma_2() -> Any:
    from transformers import Gemma2Config

    shape = {"vocab_size": 112, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 16}
    text, tiny = Gemma2Config(**shape, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0), paligemma()
    settings = {"image_token_index": 98, "projection_dim": 48, "hidden_size": 48}
    return type(tiny)(type(tiny.config)(vision_config=tiny.config.vision_config, text_config=text, **settings))


def language_model_of_paligemma() -> Any:
    from transformers import GemmaForCausalLM

    return GemmaForCausalLM(paligemma().model.language_model.config)


NO_TOKENIZER: dict[str, Any] = {"tokenizer": None}
# Family whose tokenizer and processor are taken, model, settings, and what is said.
REFUSED_MODELS = [
    ("llava", onevision, {}, r"LlavaOnevisionForConditionalGeneration .* only LlavaForCond"),
    ("llava", lambda: llava().model, {}, "LlavaModel has no language model head"),
    ("llava", pixtral, NO_TOKENIZER, "is a 'pixtral', whose images have no one size"),
    ("llava", lambda: llava(image_token_index=96), {}, "image_token_id is 96 and the embedding table has 96 rows"),
    ("smolvlm", lambda: smolvlm().model, {}, "SmolVLMModel has no language model head; expected one of LlavaForCond"),
    ("smolvlm", lambda: smolvlm(image_token_id=112), {}, "image_token_id is 112 and the embedding table has 112"),
    ("smolvlm", smolvlm, NO_TOKENIZER, "its tokenizer, which knows the tokens around them, was not found"),
    ("paligemma", paligemma, {"tokenizer": make_tokenizer()}, "expected token 98, the placeholder, twice"),
    ("paligemma", language_model_of_paligemma, {}, "its decoder attends in both directions"),
    ("paligemma", paligemma_2, NO_TOKENIZER, "model type 'gemma2' is not supported"),
    ("qwen2_5_vl", qwen3_vl, {}, r"Qwen3VLFor.* layers \[0\] of its vision tower .* \(deepstack\); adapters can"),
    ("qwen2_5_vl", lambda: qwen2_5_vl().model, {}, "Qwen2_5_VLModel has no language model head"),
    ("qwen2_5_vl", lambda: qwen2_5_vl(image_token_id=500), {}, "image_token_id is 500 and the embedding table has 96"),
]
# Family, image processor, and what is said.
REFUSED_PROCESSORS = [
    ("llava", None, "no image processor was found"),
    ("llava", clip_processor(32), r"gives images of \(32, 32\), the vision tower takes \(24, 24\): set its crop_size"),
    ("llava", clip_processor(do_center_crop=False), "gives images of any size"),
    ("llava", siglip_processor(20), r"gives images of \(20, 20\)"),
    ("llava", clip_processor(size={"shortest_edge": 24, "longest_edge": 40}), "expected a shortest_edge"),
    ("llava", clip_processor(do_pad=True), "pads"),
    ("llava", clip_processor(resample=None), "names no filter: set its resample, to 2"),
    ("llava", make_tokenizer(), "image processor TokenizersBackend is not supported; expected one of CLIP"),
    ("llava", patch_processor(), "image processor Qwen2VLImageProcessor is not supported; expected one of CLIP"),
    ("smolvlm", clip_processor(), "image processor CLIPImageProcessor is not supported; expected one of Idef"),
    ("paligemma", None, "no image processor was found"),
    ("qwen2_5_vl", None, "no image processor was found"),
    ("qwen2_5_vl", clip_processor(), "image processor CLIPImageProcessor is not supported for this model; expected"),
    *(
        (
            "qwen2_5_vl",
            patch_processor(**{"patch_size": PATCH_EDGE} | wrong),
            re.escape(f"temporal_patch_size {received}, the vision tower takes {(PATCH_EDGE, 2, 2)}: set them to that"),
        )
        # The second cuts pieces of the right size into other patches.
        for wrong, received in (
            ({"patch_size": 5}, (5, 2, 2)),
            ({"patch_size": 2, "merge_size": 4}, (2, 4, 2)),
            ({"temporal_patch_size": 1}, (PATCH_EDGE, 2, 1)),
        )
    ),
]


@pytest.mark.parametrize(("name", "make_model", "settings", "message"), REFUSED_MODELS)
def test_model_is_refused_with_the_reason(
    name: str, make_model: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        FAMILIES[name].export(tmp_path, make_model(), **settings)
    assert not list(tmp_path.iterdir()), "nothing is left of what was refused"


@pytest.mark.parametrize(("name", "processor", "message"), REFUSED_PROCESSORS)
def test_image_processor_that_does_not_fit_is_refused(name: str, processor: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        FAMILIES[name].export(tmp_path, image_processor=processor)
    assert not list(tmp_path.iterdir()), "nothing is left of what was refused"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("paligemma", {"quantization": "int4"}, r"'int4' is for bases whose attention is causal: .* leave it out"),
        (
            "qwen2_5_vl",
            {"target": "onnxruntime-cuda"},
            r"'onnxruntime-cuda' .* follow the grid of an image are not",
        ),
    ],
)
def test_setting_that_does_not_fit_is_refused(
    name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        FAMILIES[name].export(tmp_path, **settings)
    assert not list(tmp_path.iterdir()), "nothing is left of what was refused"


@pytest.mark.parametrize(("name", "make_model"), [("llava", llava), ("idefics3", idefics3), ("paligemma", paligemma)])
def test_model_with_an_image_adapter_attached_is_refused(name: str, make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    with (
        attach(model, AdaLinkConfig(rank=2, modalities=("image",))),
        pytest.raises(ModelError, match=rf"the (input embedding|projector) of this {type(model).__name__} has a hook"),
    ):
        FAMILIES[name].export(tmp_path, model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_model_with_a_hook_on_its_projector_is_refused(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].make_model()
    projector = model.model.multi_modal_projector if name == "llava" else model.model.visual.merger
    projector.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ModelError, match=f"the projector of this {type(model).__name__} has a hook"):
        FAMILIES[name].export(tmp_path, model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "field", "change"),
    [
        ("llava", "image_token_id", {"image_token_id": 96}),
        ("llava", "image_token_id", {"image_token_id": 0}),
        ("llava", "tokens_per_image", {"tokens_per_image": 0}),
        ("llava", "image_size", {"image_size": (24, 0)}),
        ("llava", "files", {"files": ("base/vision/model.onnx.data",)}),
        ("llava", "$.files['base/vision/other.json']", {"preprocessor": "base/vision/other.json"}),
        ("smolvlm", "tiles", {"tiles": {"end": (TILE_VOCAB_SIZE,)}}),
        ("smolvlm", "tiles", {"tiles": {"before_whole": (98, TILE_IMAGE_TOKEN)}}),
        ("smolvlm", "tiles.before_tile", {"tiles": {"before_tile": (((98,), (98,)),)}}),
        ("paligemma", "prompt_form.image", {"prompt_form": {"image": ""}}),
        ("qwen2_5_vl", "patches", {"patches": {"merge": 0}}),
        ("qwen2_5_vl", "patches", {"patches": {"window": 0}}),
        ("qwen2_5_vl", "", {"patches": {"merge": 3}}),
        ("qwen2_5_vl", "", {"tokens_per_image": 4}),
    ],
)
def test_wrong_image_side_is_named_by_its_field(
    vision_exports: VisionExports, name: str, field: str, change: dict[str, Any]
) -> None:
    manifest = vision_exports[name].manifest
    vision = manifest.base.vision
    for key, value in change.items():
        part = msgspec.structs.replace(getattr(vision, key), **value) if isinstance(value, dict) else value
        vision = msgspec.structs.replace(vision, **{key: part})
    with pytest.raises(ManifestError) as caught:
        encode_manifest(msgspec.structs.replace(manifest, base=msgspec.structs.replace(manifest.base, vision=vision)))
    assert caught.value.field == (field if field.startswith("$") else f"$.base.vision.{field}".rstrip("."))
