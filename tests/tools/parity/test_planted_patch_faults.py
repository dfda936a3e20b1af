"""`adalink verify` where images keep their shape: a clean deployment passes, and each planted fault is found."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from helpers.runtime import reseal
from helpers.tiny_models import qwen2_5_vl
from helpers.tiny_tokenizer import make_tokenizer
from helpers.vision import patch_processor
from helpers.vision_deployments import build_seeing_patches, spoil_tower

from adalink.runtime import Deployment, model_runner
from adalink.runtime.errors import ContractError
from adalink.runtime.ort import static_cache as onnxruntime_in_place
from adalink.runtime.storage.manifest import Vision
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.vision_schema import PatchTower
from adalink.runtime.vision.mrope import grid_positions
from adalink.runtime.vision.patches import Patching
from adalink.tools.parity.check_outputs import compare_outputs
from adalink.tools.parity.check_vision import check_vision, make_image_prompts, reference_processor
from adalink.tools.parity.reference import Reference
from adalink.tools.parity.suite import VerifyOptions, verify

WORDS = [[5, 6, 7, 8, 9], [10, 11, 12, 13]]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("clean"), qwen2_5_vl()
    for part in (model, make_tokenizer(), patch_processor()):
        part.save_pretrained(root / "model")
    return root / "model", build_seeing_patches(root, model).folder


@pytest.fixture
def deployment(clean, tmp_path):
    """A copy to plant a fault in."""
    model, original = clean
    return model, shutil.copytree(original, tmp_path / "deployment")


def failures(model, folder):
    """Of the checks of images, for the base model."""
    vision = read_manifest(folder).base.vision
    with Deployment.open(folder, threads=1) as opened:
        reference, own = Reference(model, opened.manifest.base), reference_processor(str(model), vision)
        checks = check_vision(opened, reference, own)
        image_prompts = make_image_prompts(opened, WORDS, 256, own)
        checks += compare_outputs("base/images", opened, reference, None, image_prompts.rows, image_prompts).checks
    return {check.name for check in checks if not check.passed}


def test_a_clean_deployment_passes_on_images_too(deployment):
    report = verify(deployment[1], str(deployment[0]), {}, VerifyOptions(threads=1, quick=True))
    assert report.passed
    names = {check.name for check in report.checks}
    own = {"vision/pixel-values", "vision/patch-tokens", "vision/image-embeds"}
    assert names >= own | {"base/images/logits", "task/both/images/top1", "control/looks/images/logits"}
    assert not failures(*deployment)


@pytest.mark.parametrize(
    "fault",
    [
        lambda positions: positions[..., [0, 2, 1]],
        lambda positions: positions[..., [1, 0, 2]],
        lambda positions: np.arange(positions.shape[1])[None, :, None].repeat(3, axis=2),
    ],
    ids=["columns for rows", "rows for moments", "all in a line"],
)
def test_wrong_positions_are_found(deployment, monkeypatch, fault):
    monkeypatch.setattr(
        model_runner, "grid_positions", lambda *given: np.ascontiguousarray(fault(grid_positions(*given)))
    )
    assert (
        {"base/images/logits"} <= failures(*deployment) <= {f"base/images/{name}" for name in ("logits", "kl", "top1")}
    )


@pytest.mark.parametrize("name", ["patch_positions", "window_patches", "patch_places"])
def test_a_wrong_place_in_the_tower_is_found(deployment, monkeypatch, name):
    inputs = PatchTower.inputs

    def wrong(self, grid):
        own = inputs(self, grid)
        places = np.arange(len(own["patch_places"]))
        changed = {
            "patch_positions": own["patch_positions"][:, ::-1],
            "window_patches": np.where(own["window_patches"] < 0, 0, own["window_patches"]),  # nothing masked
            "patch_places": places,  # windows are not undone
        }
        return own | {name: np.ascontiguousarray(changed[name])}

    monkeypatch.setattr(PatchTower, "inputs", wrong)
    assert {"vision/image-embeds", "base/images/logits"} <= failures(*deployment)


def test_patches_in_the_wrong_order_are_found(deployment, monkeypatch):
    cut = Patching.cut
    monkeypatch.setattr(Patching, "cut", lambda self, values: cut(self, values)[::-1].copy())
    assert {"vision/pixel-values", "base/images/logits"} <= failures(*deployment)


def test_another_number_of_places_for_a_picture_is_found(deployment, monkeypatch):
    image_tokens = Vision.image_tokens
    monkeypatch.setattr(Vision, "image_tokens", lambda self, grid: [*image_tokens(self, grid), self.image_token_id])
    vision = read_manifest(deployment[1]).base.vision
    with Deployment.open(deployment[1], threads=1) as opened:
        checks = check_vision(
            opened, Reference(deployment[0], opened.manifest.base), reference_processor(deployment[0], vision)
        )
    assert {check.name for check in checks if not check.passed} == {"vision/patch-tokens"}


def test_one_weight_of_the_vision_tower_is_found(deployment):
    spoil_tower(deployment[1])
    assert "vision/image-embeds" in failures(*deployment)


@pytest.mark.parametrize("change", [{"most_pixels": 900}, {"frames": 1}])
def test_another_way_to_cut_is_found(deployment, change):
    path = deployment[1] / "base" / "vision" / "preprocessor.json"
    steps = json.loads(path.read_text())
    path.write_text(json.dumps(steps | {"patching": steps["patching"] | change}))
    reseal(deployment[1])
    with pytest.raises(ContractError, match=r"the model gives .* patches of .* for 4 pictures, that of the deployment"):
        failures(*deployment)


def test_generation_that_counts_on_wrongly_is_found(deployment, monkeypatch):
    """Text alone shows it: the first token after a prompt would stand where its last one stands."""
    after = onnxruntime_in_place.positions_after
    monkeypatch.setattr(onnxruntime_in_place, "positions_after", lambda positions: after(positions) - 1)
    report = verify(deployment[1], str(deployment[0]), {}, VerifyOptions(threads=1, quick=True))
    assert "base/decode-logits" in {check.name for check in report.checks if not check.passed}
