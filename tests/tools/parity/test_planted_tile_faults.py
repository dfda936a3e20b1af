"""`adalink verify` on a deployment that cuts images into tiles: a clean one passes, and each planted fault is found."""

from __future__ import annotations

import json
import shutil

import msgspec
import pytest
from helpers.runtime import reseal
from helpers.tiny_models import smolvlm
from helpers.tiny_tokenizer import make_tile_tokenizer
from helpers.vision import tile_processor
from helpers.vision_deployments import build_seeing_tiles

from adalink.runtime import Deployment
from adalink.runtime.errors import ContractError
from adalink.runtime.storage.manifest_io import encode_manifest, read_manifest
from adalink.runtime.vision.tiles import Tiling
from adalink.tools.parity.check_vision import check_vision, reference_processor
from adalink.tools.parity.reference import Reference
from adalink.tools.parity.suite import VerifyOptions, verify


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root, model = tmp_path_factory.mktemp("clean"), smolvlm()
    for part in (model, make_tile_tokenizer(), tile_processor()):
        part.save_pretrained(root / "model")
    return root / "model", build_seeing_tiles(root, model).folder


@pytest.fixture
def deployment(clean, tmp_path):
    """A copy to plant a fault in."""
    model, original = clean
    return model, shutil.copytree(original, tmp_path / "deployment")


def failures(model, folder):
    """Of the checks before the engine."""
    vision = read_manifest(folder).base.vision
    with Deployment.open(folder) as opened:
        checks = check_vision(opened, Reference(model, opened.manifest.base), reference_processor(str(model), vision))
    return {check.name for check in checks if not check.passed}


def all_failures(model, folder):
    return {
        check.name
        for check in verify(folder, str(model), {}, VerifyOptions(threads=1, quick=True)).checks
        if not check.passed
    }


def test_a_clean_deployment_passes(deployment):
    report = verify(deployment[1], str(deployment[0]), {}, VerifyOptions(threads=1, quick=True))
    assert report.passed
    names = {check.name for check in report.checks}
    own = {"vision/pixel-values", "vision/tile-tokens", "vision/image-embeds"}
    assert names >= own | {"base/images/logits", "task/both/images/top1", "control/looks/images/logits"}


def change_tokens(folder, **change):
    manifest = read_manifest(folder)
    vision = manifest.base.vision
    vision = msgspec.structs.replace(vision, tiles=msgspec.structs.replace(vision.tiles, **change))
    base = msgspec.structs.replace(manifest.base, vision=vision)
    (folder / "manifest.json").write_bytes(encode_manifest(msgspec.structs.replace(manifest, base=base)))


@pytest.mark.parametrize("fault", ["columns for rows", "two line ends apart", "no fence at the end"])
def test_wrong_tokens_around_tiles_are_found(deployment, fault):
    tiles = read_manifest(deployment[1]).base.vision.tiles
    changes = {
        "columns for rows": {"before_tile": tuple(zip(*tiles.before_tile, strict=True))},
        "two line ends apart": {"before_whole": (96, 96, *tiles.before_whole[1:])},
        "no fence at the end": {"end": ()},
    }
    change_tokens(deployment[1], **changes[fault])
    assert failures(*deployment) == {"vision/tile-tokens"}


def test_tiles_in_the_wrong_order_are_found(deployment, monkeypatch):
    cut = Tiling.cut
    monkeypatch.setattr(Tiling, "cut", lambda self, picture, grid: cut(self, picture, grid)[::-1])
    assert {"vision/pixel-values", "base/images/logits"} <= all_failures(*deployment)


def test_a_missing_tile_of_the_whole_is_found(deployment, monkeypatch):
    cut = Tiling.cut
    monkeypatch.setattr(Tiling, "cut", lambda self, picture, grid: cut(self, picture, grid)[1:])
    with pytest.raises(ContractError, match=r"the image processor of the model gives .* tiles of .*, that of the dep"):
        failures(*deployment)


@pytest.mark.parametrize("change", [{"resample": 3}, {"mean": [0.5, 0.5, 0.49]}])
def test_another_preprocessor_is_found(deployment, change):
    path = deployment[1] / "base" / "vision" / "preprocessor.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    reseal(deployment[1])
    assert "vision/pixel-values" in failures(*deployment)
