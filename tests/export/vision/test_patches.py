"""A model whose pictures keep their shape, exported: one vision graph for all grids, positions of three axes."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from helpers.tiny_models import IMAGE_TOKEN, PATCH_EDGE, PIECE_EDGE, llava, qwen2_5_vl, qwen2_vl, qwen3_vl
from helpers.tiny_tokenizer import make_tokenizer
from helpers.vision import clip_processor, patch_processor

from adalink.export.base.export import export_base
from adalink.runtime.errors import ConfigError, ManifestError, ModelError
from adalink.runtime.ort.patch_vision import OnnxPatchGraph
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest import Vision
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.manifest_validation import check_manifest
from adalink.runtime.storage.vision_base import vision_base
from adalink.runtime.storage.vision_schema import PatchTower
from adalink.training.models.loading import base_fingerprint

MODELS = {"qwen2": qwen2_vl, "qwen2.5": qwen2_5_vl}
# And towers of which all layers, or none, look through windows.
TOWERS = MODELS | {"all windows": lambda: qwen2_5_vl(()), "no window": lambda: qwen2_5_vl((0, 1, 2))}
GRIDS = ((1, 1), (2, 2), (3, 5), (1, 7), (4, 4), (5, 2))


def export(model: Any, folder: Path, **settings: Any) -> Any:
    return export_base(
        model, folder, **({"tokenizer": make_tokenizer(), "image_processor": patch_processor()} | settings)
    )


def seen(model: Any, pixels: torch.Tensor, grid: tuple[int, int]) -> np.ndarray[Any, Any]:
    sizes = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
    with torch.no_grad():
        return model.get_image_features(pixels.to(model.dtype), sizes).pooler_output[0].numpy()


@pytest.mark.parametrize("name", TOWERS)
def test_vision_graph_agrees_with_pytorch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TOWERS[name]()
    manifest = export(model, tmp_path)
    exact, vision = copy.deepcopy(model).double(), manifest.base.vision
    graph = OnnxPatchGraph(tmp_path / vision.graph, vision_base(manifest.base), vision.patches, 1)
    inputs, found = PatchTower.inputs, set()
    for grid in GRIDS:
        count = 4 * grid[0] * grid[1]
        pixels = torch.randn(count, 6 * PATCH_EDGE**2, generator=torch.Generator().manual_seed(count))
        plain = seen(model, pixels, grid)
        limit = 8 * float(np.abs(plain - seen(exact, pixels, grid)).max())
        received = graph.run(pixels.numpy(), grid)
        assert received.dtype == np.float32
        assert np.abs(received - plain).max() <= limit
        assert limit < 1e-4 * np.abs(plain).max()

        def off(changed: str, grid: Any = grid, pixels: Any = pixels, plain: Any = plain, limit: float = limit) -> None:
            """Whether the limit finds an input that is wrong."""
            wrong = {
                "patch_positions": lambda own: own[:, ::-1],
                "window_patches": lambda own: np.where(own < 0, own, np.roll(own, 1, axis=0).clip(0)),
                "patch_places": lambda own: own[::-1],
            }[changed]
            own = inputs(vision.patches, grid)
            own[changed] = np.ascontiguousarray(wrong(own[changed]))
            monkeypatch.setattr(PatchTower, "inputs", lambda self, grid: own)
            if np.abs(graph.run(pixels.numpy(), grid) - plain).max() > 100 * limit:
                found.add(changed)
            monkeypatch.setattr(PatchTower, "inputs", inputs)

        for changed in inputs(vision.patches, grid):
            off(changed)
    assert found == set(inputs(vision.patches, (1, 1)))


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "portable"])
@pytest.mark.parametrize("name", MODELS)
def test_the_engine_takes_positions_of_three_axes(name: str, target: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    manifest = export(model, tmp_path, target=target)
    path = tmp_path / manifest.variants[target].graph
    operators = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert ("GroupQueryAttention" in operators) == (target == "onnxruntime-cpu")
    session, cache = ort.InferenceSession(str(path)), manifest.base.cache
    shape = next(node.shape for node in session.get_inputs() if node.name == "position_ids")
    assert shape[-1] == 3
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 6, manifest.base.hidden_size, generator=generator)
    positions = torch.randint(0, 9, (2, 6, 3), generator=generator)
    with torch.no_grad():
        expected = [
            model(
                inputs_embeds=embeds, position_ids=own.permute(2, 0, 1), attention_mask=torch.ones(2, 6)
            ).logits.numpy()
            for own in (positions, positions[..., [0, 2, 1]])
        ]
    empty = np.zeros((2, cache.kv_heads, 0, cache.head_dim), np.float32)
    feeds: dict[str, Any] = {past: empty for past, _ in cache.names()}
    feeds |= {"inputs_embeds": embeds.numpy(), "position_ids": positions.numpy()}
    if target == "portable":
        feeds["attention_mask"] = np.ones((2, 6), np.int64)
    else:
        feeds |= {"sequence_lengths": np.full(2, 6, np.int32), "logits_at": np.arange(12)}
    received = session.run(["logits"], feeds)[0].reshape(expected[0].shape)
    np.testing.assert_allclose(received, expected[0], atol=1e-4)
    assert np.abs(received - expected[1]).max() > 0.01, "rows and columns are told apart"


def test_manifest_describes_the_image_side(tmp_path: Path) -> None:
    manifest = export(qwen2_5_vl(), tmp_path)
    vision = manifest.base.vision
    assert (vision.architecture, manifest.base.architecture) == ("qwen2_5_vl", "qwen2_5_vl_text")
    assert (vision.image_token_id, vision.image_size) == (IMAGE_TOKEN, (PIECE_EDGE, PIECE_EDGE))
    assert vision.patches == PatchTower(merge=2, window=2)
    assert vision.image_tokens((2, 3)) == [IMAGE_TOKEN] * 6
    assert manifest.base.fingerprint == base_fingerprint(qwen2_5_vl())
    assert export(qwen2_vl(), tmp_path / "other").base.vision.patches == PatchTower(merge=2, window=None)
    verify_files(tmp_path, manifest, vision.all_files)
    assert read_manifest(tmp_path) == manifest


@pytest.mark.parametrize(
    "change",
    [
        {"patches": PatchTower(merge=0, window=2)},
        {"patches": PatchTower(merge=2, window=0)},
        {"patches": PatchTower(merge=3, window=2)},
        {"tokens_per_image": 4},
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    manifest = export(qwen2_5_vl(), tmp_path)
    vision = msgspec.structs.replace(manifest.base.vision, **change)
    wrong = msgspec.structs.replace(manifest, base=msgspec.structs.replace(manifest.base, vision=vision))
    with pytest.raises(ManifestError, match=r"\$.base.vision"):
        check_manifest(wrong)


def test_a_manifest_of_before_there_were_patches_is_read() -> None:
    before = {"architecture": "llava", "graph": "g", "files": ["g"], "preprocessor": "p", "image_size": [24, 24]}
    vision = msgspec.convert(before | {"image_token_id": 5, "tokens_per_image": 9, "tiles": None}, Vision)
    assert vision.patches is None
    assert vision.image_tokens((0, 0)) == [5] * 9


def test_a_checkpoint_brings_its_own_processor_and_tokenizer(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for part in (qwen2_5_vl(), make_tokenizer(), patch_processor()):
        part.save_pretrained(source)
    manifest = export_base(source, tmp_path / "out")
    assert manifest.base.vision == export(qwen2_5_vl(), tmp_path / "again").base.vision


def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"Qwen3VLFor.* layers \[0\] of its vision tower .* \(deepstack\); adapters can"
    ):
        export(qwen3_vl(), tmp_path)
    with pytest.raises(ConfigError, match=r"'onnxruntime-cuda' .* follow the grid of a picture are not supported"):
        export(qwen2_5_vl(), tmp_path, target="onnxruntime-cuda")
    with pytest.raises(
        ModelError, match="image processor CLIPImageProcessor is not supported for this model; expected"
    ):
        export(qwen2_5_vl(), tmp_path, image_processor=clip_processor())
    with pytest.raises(
        ModelError, match="image processor Qwen2VLImageProcessor is not supported; expected one of CLIP"
    ):
        export(llava(), tmp_path, image_processor=patch_processor())
    # The second cuts pieces of the right size into other patches.
    for wrong in ({"patch_size": 5}, {"patch_size": 2, "merge_size": 4}, {"temporal_patch_size": 1}):
        given = tuple(({"patch_size": PATCH_EDGE, "merge_size": 2, "temporal_patch_size": 2} | wrong).values())
        message = f"temporal_patch_size {given}, the vision tower takes {(PATCH_EDGE, 2, 2)}: set them to that"
        with pytest.raises(ModelError, match=re.escape(message)):
            export(qwen2_5_vl(), tmp_path, image_processor=patch_processor(**wrong))
    with pytest.raises(ModelError, match="no image processor was found"):
        export(qwen2_5_vl(), tmp_path, image_processor=None)
    with pytest.raises(ModelError, match="Qwen2_5_VLModel has no language model head"):
        export(qwen2_5_vl().model, tmp_path)
    with pytest.raises(ModelError, match="image_token_id is 500 and the embedding table has 96 rows"):
        export(qwen2_5_vl(image_token_id=500), tmp_path)
    model = qwen2_5_vl()
    model.model.visual.merger.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ModelError, match="projector of this Qwen2_5_VLForConditionalGeneration has a hook"):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is left of what was refused"
