"""Graphs of models that take images: PyTorch's numbers, and an engine that knows of no image."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from helpers.export import Array, yardstick
from helpers.tiny_models import IMAGE_SIZE, IMAGE_TOKEN, PATCH_EDGE, TILE_EDGE, _fill, llama, llava, paligemma
from helpers.tiny_models import qwen2_5_vl as qwen
from helpers.vision import check_same_engine
from helpers.vision_deployments import VisionExport, VisionExports
from helpers.vision_families import FAMILIES, PATCHES, TILES
from transformers import LlamaForCausalLM

from adalink.export.base.export import export_base
from adalink.runtime.ort.patch_vision import OnnxPatchGraph
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.vision_base import vision_base
from adalink.runtime.storage.vision_schema import PatchTower
from adalink.training.models.loading import base_fingerprint

TARGETS = ("portable", "onnxruntime-cpu")
LENGTH, SHORT, STEPS = 12, 7, 6
GRIDS = ((1, 1), (2, 2), (3, 5), (1, 7), (4, 4), (5, 2))


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


def shared() -> Any:
    """A projector that has matrices of the language model."""
    model = llava()
    attention = model.model.language_model.layers[0].self_attn
    model.model.multi_modal_projector.linear_2 = torch.nn.Sequential(attention.q_proj, attention.o_proj)
    return model


# Towers beside those of the registry, by a name that begins with the family whose processor they take.
MORE_TOWERS = {
    "llava, class token": lambda: llava(vision_feature_select_strategy="full"),
    "llava, two layers": lambda: llava(vision_feature_layer=[-2, 1]),
    "llava, siglip": siglip,
    "llava, shared": shared,
    "qwen2_5_vl, all windows": lambda: qwen(()),
    "qwen2_5_vl, no window": lambda: qwen((0, 1, 2)),
}
PATCH_TOWERS = ["qwen2_vl", *(name for name in ("qwen2_5_vl", *MORE_TOWERS) if name.startswith("qwen2_5_vl"))]
OTHER_TOWERS = ["llava", "fast_vlm", *TILES, "paligemma", *(name for name in MORE_TOWERS if name.startswith("llava"))]


def exported(name: str, exports: VisionExports, folder: Path) -> tuple[Any, Path, Manifest]:
    """A model of the registry or of ``MORE_TOWERS``, where it is exported to, and the manifest."""
    if name in FAMILIES:
        return exports[name].model, exports[name].folder, exports[name].manifest
    model = MORE_TOWERS[name]()
    return model, folder, FAMILIES[name.split(",")[0]].export(folder, model)


def image_features(model: Any, pixels: torch.Tensor, *more: Any, tiles: bool = False) -> Array:
    """PyTorch's embeddings of images, or of the tiles of one."""
    with torch.no_grad():
        pixels = pixels.to(model.dtype)
        features = model.get_image_features(pixels[None] if tiles else pixels, *more).pooler_output
        return torch.cat([each.reshape(-1, each.shape[-1]) for each in features]).numpy()


@pytest.mark.parametrize("name", OTHER_TOWERS)
def test_vision_graph_agrees_with_pytorch(vision_exports: VisionExports, name: str, tmp_path: Path) -> None:
    model, folder, manifest = exported(name, vision_exports, tmp_path)
    exact_model, tiles = copy.deepcopy(model).double(), name in TILES
    session, edge = ort.InferenceSession(str(folder / manifest.base.vision.graph)), TILE_EDGE if tiles else IMAGE_SIZE
    for images in (1, 2, 10):
        pixels = torch.randn(images, 3, edge, edge, generator=torch.Generator().manual_seed(images))
        plain, exact = (image_features(each, pixels, tiles=tiles) for each in (model, exact_model))
        # As `helpers.export.yardstick`: eight times what PyTorch itself is away from float64.
        limit = 8 * float(np.abs(plain - exact).max())
        (received,) = session.run(["image_embeds"], {"pixel_values": pixels.numpy()})
        assert received.dtype == np.float32
        assert received.shape == (images, manifest.base.vision.tokens_per_image, plain.shape[1])
        assert np.abs(received.reshape(plain.shape) - plain).max() <= limit
        assert limit < 1e-4 * np.abs(plain).max()
        # What the limit must be able to find.
        for wrong in (received[:, ::-1], *_faults(name, model, session, pixels)):
            assert np.abs(wrong.reshape(plain.shape) - plain).max() > 100 * limit


def _faults(name: str, model: Any, session: Any, pixels: torch.Tensor) -> Iterator[Array]:
    """Embeddings of pixels in another order, and of the layer beside the right one."""
    if name != "fast_vlm":  # whose random tower hardly looks at an image
        yield session.run(["image_embeds"], {"pixel_values": pixels.transpose(2, 3).contiguous().numpy()})[0]
    if name in ("llava", "llava, class token"):
        other = copy.deepcopy(model)
        other.config.vision_feature_layer = 1
        yield image_features(other, pixels)


@pytest.mark.parametrize("name", PATCH_TOWERS)
def test_vision_graph_of_patches_agrees_with_pytorch(
    vision_exports: VisionExports, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder, manifest = exported(name, vision_exports, tmp_path)
    exact, vision = copy.deepcopy(model).double(), manifest.base.vision
    graph = OnnxPatchGraph(folder / vision.graph, vision_base(manifest.base), vision.patches, 1)
    inputs, found = PatchTower.inputs, set()
    wrong = {
        "patch_positions": lambda right: right[:, ::-1],
        "window_patches": lambda right: np.where(right < 0, right, np.roll(right, 1, axis=0).clip(0)),
        "patch_places": lambda right: right[::-1],
    }
    for grid in GRIDS:
        count, sizes = 4 * grid[0] * grid[1], torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
        pixels = torch.randn(count, 6 * PATCH_EDGE**2, generator=torch.Generator().manual_seed(count))
        plain = image_features(model, pixels, sizes)
        limit = 8 * float(np.abs(plain - image_features(exact, pixels, sizes)).max())
        received = graph.run(pixels.numpy(), grid)
        assert received.dtype == np.float32
        assert np.abs(received - plain).max() <= limit
        assert limit < 1e-4 * np.abs(plain).max()
        right = inputs(vision.patches, grid)
        for changed in right:  # what the limit must be able to find
            fault = right | {changed: np.ascontiguousarray(wrong[changed](right[changed]))}
            with monkeypatch.context() as patch:
                patch.setattr(PatchTower, "inputs", lambda self, grid, fault=fault: fault)
                if np.abs(graph.run(pixels.numpy(), grid) - plain).max() > 100 * limit:
                    found.add(changed)
    assert found == set(inputs(vision.patches, (1, 1)))


def _language_model_alone(name: str, model: Any) -> Any:
    text = llama() if name == "llava" else LlamaForCausalLM(model.config.text_config)
    text.model, text.lm_head = FAMILIES[name].language(model), model.lm_head
    text.config = model.config.text_config
    return text


@pytest.mark.parametrize("name", ["llava", *TILES])
def test_engine_is_that_of_the_language_model_alone(vision_exports: VisionExports, name: str, tmp_path: Path) -> None:
    whole, text = vision_exports[name], _language_model_alone(name, vision_exports[name].model)
    for target in TARGETS:
        alone = export_base(text, tmp_path, target=target, tokenizer=FAMILIES[name].make_tokenizer())
    check_same_engine(whole.manifest, alone)


@pytest.mark.parametrize("name", ["llava", *TILES, "paligemma", "qwen2_5_vl"])
def test_fingerprint_is_the_models(vision_exports: VisionExports, name: str) -> None:
    assert vision_exports[name].manifest.base.fingerprint == base_fingerprint(FAMILIES[name].make_model())


class PrefixEngine:
    """A language engine that is called as the runtime calls it, on embeddings of tokens."""

    def __init__(self, export: VisionExport, target: str) -> None:
        self._model, self._base = export.model, export.manifest.base
        self._session = ort.InferenceSession(str(export.folder / export.manifest.variants[target].graph))
        self._cache: dict[str, Array] = {}

    def __call__(self, ids: torch.Tensor, mask: Array, positions: Array, *, first: bool) -> Array:
        cache = self._base.cache
        assert cache is not None
        if first:
            empty = np.zeros((len(ids), cache.kv_heads, 0, cache.head_dim), np.float32)
            self._cache = {past: empty for past, _ in cache.names()}
        with torch.no_grad():
            embeds = self._model.get_input_embeddings()(ids).numpy()
        feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **self._cache}
        logits, *present = self._session.run(None, feeds)
        self._cache = dict(zip(self._cache, present, strict=True))
        return np.asarray(logits)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_bidirectional_prompt_then_steps_are_pytorchs_in_a_padded_batch(
    vision_exports: VisionExports, target: str, pad: str
) -> None:
    """A prompt of 12 and one of 7, then a token, three at once and two: prompts whole, what follows causal."""
    model = vision_exports["paligemma"].model
    tokens = torch.randint(3, 96, (2, LENGTH + STEPS), generator=torch.Generator().manual_seed(4))
    prompts, follows = (LENGTH, SHORT), tokens[:, LENGTH:]
    mask, ids = np.ones((2, LENGTH), np.int64), tokens[:, :LENGTH].clone()
    blank = slice(LENGTH - SHORT) if pad == "left" else slice(SHORT, LENGTH)
    mask[1, blank] = 0
    ids[1, mask[1] != 0] = tokens[1, :SHORT]
    ids[1, blank] = 0
    engine = PrefixEngine(vision_exports["paligemma"], target)
    found = [engine(ids, mask, np.maximum(mask.cumsum(axis=1) - 1, 0), first=True)]
    at = np.array(prompts)[:, None]
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        mask = np.concatenate([mask, np.ones((2, stop - start), np.int64)], axis=1)
        found.append(engine(follows[:, start:stop], mask, at + np.arange(start, stop), first=False))
    received = np.concatenate(found, axis=1)
    for row, length in enumerate(prompts):
        whole = torch.cat([tokens[row, :length], follows[row]])[None]
        types = (torch.arange(length + STEPS) >= length).long()[None]
        expected, limit = yardstick(model, input_ids=whole, token_type_ids=types)
        assert np.abs(received[row][mask[row] != 0] - expected[0]).max() <= limit
        for wrong in (torch.ones_like(types), torch.zeros_like(types)):  # all causal, nothing causal
            other, _ = yardstick(model, input_ids=whole, token_type_ids=wrong)
            assert np.abs(other - expected).max() > 100 * limit


def _operators(folder: Path, manifest: Manifest, target: str) -> set[str]:
    graph = onnx.load(folder / manifest.variants[target].graph, load_external_data=False).graph
    return {node.op_type for node in graph.node}


def test_bidirectional_graph_holds_standard_operators_and_says_why(tmp_path: Path) -> None:
    said: list[str] = []
    manifest = FAMILIES["paligemma"].export(tmp_path, paligemma(tie_word_embeddings=True), progress=said.append)
    assert "GroupQueryAttention" not in _operators(tmp_path, manifest, "onnxruntime-cpu")
    assert any("its prompt attends in both directions, and GroupQueryAttention only causally" in line for line in said)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [name for name in PATCHES if name != "qwen3_vl"])
def test_engine_takes_positions_of_three_axes(vision_exports: VisionExports, name: str, target: str) -> None:
    export = vision_exports[name]
    grouped = "GroupQueryAttention" in _operators(export.folder, export.manifest, target)
    assert grouped == (target == "onnxruntime-cpu")
    session = ort.InferenceSession(str(export.folder / export.manifest.variants[target].graph))
    base, cache = export.manifest.base, export.manifest.base.cache
    assert next(node.shape for node in session.get_inputs() if node.name == "position_ids")[-1] == 3
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 6, base.hidden_size, generator=generator)
    positions = torch.randint(0, 9, (2, 6, 3), generator=generator)
    mask = torch.ones(2, 6)
    with torch.no_grad():
        expected, turned = (
            export.model(inputs_embeds=embeds, position_ids=each.permute(2, 0, 1), attention_mask=mask).logits.numpy()
            for each in (positions, positions[..., [0, 2, 1]])
        )
    empty = np.zeros((2, cache.kv_heads, 0, cache.head_dim), np.float32)
    feeds: dict[str, Any] = {past: empty for past, _ in cache.names()}
    feeds |= {"inputs_embeds": embeds.numpy(), "position_ids": positions.numpy()}
    if grouped:
        feeds |= {"sequence_lengths": np.full(2, 6, np.int32), "logits_at": np.arange(12)}
    else:
        feeds["attention_mask"] = np.ones((2, 6), np.int64)
    received = session.run(["logits"], feeds)[0].reshape(expected.shape)
    np.testing.assert_allclose(received, expected, atol=1e-4)
    assert np.abs(received - turned).max() > 0.01, "rows and columns are told apart"
