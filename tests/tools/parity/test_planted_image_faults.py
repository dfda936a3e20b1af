"""`adalink verify` on a deployment that takes images: a clean one passes, and each planted fault is found."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from helpers.runtime import reseal
from helpers.tiny_models import IMAGE_TOKEN, IMAGE_TOKENS, llava
from helpers.tiny_tokenizer import make_tokenizer
from helpers.vision import clip_processor
from helpers.vision_deployments import build_seeing, spoil_tower

from adalink.runtime import Deployment, model_runner
from adalink.runtime.errors import ContractError
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.vision import tower as vision
from adalink.runtime.vision.placeholders import merge
from adalink.tools.parity.check_vision import ReferenceProcessor, make_image_prompts
from adalink.tools.parity.suite import VerifyOptions, verify


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean")
    llava().save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    clip_processor().save_pretrained(root / "model")
    return root / "model", build_seeing(root).folder


@pytest.fixture
def deployment(clean, tmp_path):
    """A copy to plant a fault in."""
    model, original = clean
    return model, shutil.copytree(original, tmp_path / "deployment")


def outcome(model, folder):
    return verify(folder, str(model), {}, VerifyOptions(threads=1, quick=True))


def failures(model, folder):
    return {check.name for check in outcome(model, folder).checks if not check.passed}


def test_a_clean_deployment_passes_on_images_too(deployment):
    report = outcome(*deployment)
    assert report.passed
    names = {check.name for check in report.checks}
    assert names >= {"vision/pixel-values", "vision/image-embeds", "base/images/logits", "task/both/images/top1"}
    assert "control/looks/images/logits" in names
    assert "control/looks/logits" not in names, "a task of images alone does not change text"
    assert "control/words/logits" in names
    receipt = json.dumps(report.receipt)
    assert all(path in receipt for path in read_manifest(deployment[1]).base.vision.all_files)


@pytest.mark.parametrize("change", [{"resample": 2}, {"mean": [0.48, 0.4578275, 0.40821073]}, {"crop": [24, 23]}])
def test_another_preprocessor_is_found(deployment, change):
    path = deployment[1] / "base" / "vision" / "preprocessor.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    reseal(deployment[1])
    if "crop" in change:
        with pytest.raises(ContractError, match=r"4 tiles of \(3, 24, 24\) .* that of the deployment 4 of \(3, 24, 23"):
            outcome(*deployment)
    else:
        assert "vision/pixel-values" in failures(*deployment)


def test_one_weight_of_the_vision_tower_is_found(deployment):
    spoil_tower(deployment[1])
    assert "vision/image-embeds" in failures(*deployment)


def test_images_that_are_adapted_as_text_are_found(deployment, monkeypatch):
    def as_text(*arguments):
        embeds, modality = merge(*arguments)
        return embeds, np.zeros_like(modality)

    monkeypatch.setattr(model_runner, "merge", as_text)
    found = failures(*deployment)
    assert {f"task/{name}/images/logits" for name in ("both", "looks", "words", "asked")} <= found
    assert "base/images/logits" not in found


def test_images_in_the_wrong_order_are_found(deployment, monkeypatch):
    monkeypatch.setattr(
        model_runner, "merge", lambda table, ids, images, base: merge(table, ids, [own[::-1] for own in images], base)
    )
    assert "base/images/logits" in failures(*deployment)


def test_a_cache_that_takes_one_picture_for_another_is_found(deployment, monkeypatch):
    monkeypatch.setattr(vision, "digest_bytes", lambda data: "sha256:the same")
    assert "base/images/logits" in failures(*deployment)


def test_a_model_without_an_image_processor_is_refused(deployment, tmp_path):
    model = shutil.copytree(deployment[0], tmp_path / "model")
    (model / "preprocessor_config.json").unlink()
    with pytest.raises(ContractError, match="has no image processor and the deployment takes images"):
        outcome(model, deployment[1])


def test_images_fit_the_context_or_are_left_out(deployment):
    with Deployment.open(deployment[1]) as opened:
        own = ReferenceProcessor(clip_processor(), opened.manifest.base.vision)
        assert make_image_prompts(opened, [[5, 6, 7]], 10, own) is None
        one = make_image_prompts(opened, [[5, IMAGE_TOKEN, 6, 7]], 11, own)
        assert one.rows == [[5, *[IMAGE_TOKEN] * IMAGE_TOKENS, 6]]
        two = make_image_prompts(opened, [[5, 6, 7]], 64, own)
        assert [row.count(IMAGE_TOKEN) for row in two.rows] == [IMAGE_TOKENS, 2 * IMAGE_TOKENS]
