"""`adalink verify` on deployments that take images: clean ones pass, and each planted fault is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.host_device import HostBackend
from helpers.quick import slow_except
from helpers.runtime import reseal
from helpers.tiny_models import IMAGE_TOKEN, IMAGE_TOKENS
from helpers.vision import clip_processor
from helpers.vision_deployments import build_vision_deployment, spoil_tower
from helpers.vision_families import FAMILIES

from adalink.export.base import modules as graph_modules
from adalink.export.base.export import export_base
from adalink.runtime import Deployment, model_runner
from adalink.runtime import deployment as deployment_module
from adalink.runtime.errors import ContractError
from adalink.runtime.ort import static_cache
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest import Vision
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.vision_schema import PatchTower
from adalink.runtime.vision import tower
from adalink.runtime.vision.mrope import grid_positions
from adalink.runtime.vision.patches import Patching
from adalink.runtime.vision.placeholders import merge
from adalink.runtime.vision.tiles import Tiling
from adalink.tools.parity import suite
from adalink.tools.parity.checks.outputs import Rows, compare_outputs
from adalink.tools.parity.checks.vision import (
    ReferenceProcessor,
    check_vision,
    make_image_prompts,
    reference_processor,
)
from adalink.tools.parity.reference.model import Reference

Pair = tuple[Path, Path]
WORDS = [[5, 6, 7, 8, 9], [10, 11, 12, 13]]
SEEN_ALONE = {"vision/pixel-values", "vision/image-embeds", "base/images/logits", "task/both/images/top1"}
# What a clean deployment is checked for.
CHECKS = {
    "llava": SEEN_ALONE | {"control/looks/images/logits", "control/words/logits"},
    "smolvlm": SEEN_ALONE | {"vision/tile-tokens", "control/looks/images/logits"},
    "qwen2_5_vl": SEEN_ALONE | {"vision/patch-tokens", "control/looks/images/logits"},
    "paligemma": {"base/tokenizer", "base/images/logits", "task/both/generation", "mixed/images/decode-logits"},
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A model folder and a deployment of it, by the name of their family; each is made once."""
    root = tmp_path_factory.mktemp("clean")

    def pair(name: str) -> Pair:
        folder = root / name
        if not folder.exists():
            FAMILIES[name].save(folder / "model", build_vision_deployment(folder, name).model)
        return folder / "model", folder / "deployment"

    return pair


@pytest.fixture
def planted(clean: Callable[[str], Pair], tmp_path: Path) -> Callable[[str], Pair]:
    """A model folder and a copy of its deployment to plant a fault in."""

    def pair(name: str) -> Pair:
        model, folder = clean(name)
        return model, shutil.copytree(folder, tmp_path / "deployment")

    return pair


def outcome(model: Path, folder: Path, **options: Any) -> suite.Report:
    return suite.verify(folder, str(model), {}, suite.VerifyOptions(**{"threads": 1, "quick": True} | options))


def failed(checks: Any) -> set[str]:
    return {check.name for check in checks if not check.passed}


def failures(model: Path, folder: Path) -> set[str]:
    """Of all that is checked of a deployment, whose family the folder is named after."""
    checks = outcome(model, folder).checks
    assert {check.name for check in checks} >= CHECKS[model.parent.name]
    return failed(checks)


def vision_failures(model: Path, folder: Path) -> set[str]:
    """Of the checks before the engine."""
    vision = read_manifest(folder).base.vision
    with Deployment.open(folder, threads=1) as opened:
        images = reference_processor(str(model), vision)
        return failed(check_vision(opened, Reference(model, opened.manifest.base), images))


def image_failures(model: Path, folder: Path) -> set[str]:
    """Of the checks of images, for the base model."""
    vision = read_manifest(folder).base.vision
    with Deployment.open(folder, threads=1) as opened:
        reference, images = Reference(model, opened.manifest.base), reference_processor(str(model), vision)
        checks = check_vision(opened, reference, images)
        prompts = make_image_prompts(opened, WORDS, 256, images)
        checks += compare_outputs("base/images", opened, reference, None, Rows(prompts.rows, prompts)).checks
    return failed(checks)


@pytest.mark.parametrize("name", slow_except(CHECKS, "smolvlm"))
def test_clean_deployment_passes(clean: Callable[[str], Pair], name: str) -> None:
    model, folder = clean(name)
    report = outcome(model, folder)
    assert report.passed
    assert failed(report.checks) == set()
    names = {check.name for check in report.checks}
    assert names >= CHECKS[name]
    assert "control/looks/logits" not in names, "a task of images alone does not change text"
    receipt = json.dumps(report.receipt)
    assert all(path in receipt for path in read_manifest(folder).base.vision.all_files)
    if name in ("smolvlm", "qwen2_5_vl"):
        assert image_failures(model, folder) == set()


def change_preprocessor(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "base" / "vision" / "preprocessor.json"
    steps = json.loads(path.read_text())
    inner = {key: steps[key] | value if isinstance(value, dict) else value for key, value in change.items()}
    path.write_text(json.dumps(steps | inner))
    reseal(folder)


@pytest.mark.parametrize(
    ("name", "change", "find"),
    [
        ("llava", {"resample": 2}, failures),
        ("llava", {"mean": [0.48, 0.4578275, 0.40821073]}, failures),
        ("smolvlm", {"resample": 3}, vision_failures),
        ("smolvlm", {"mean": [0.5, 0.5, 0.49]}, vision_failures),
    ],
)
def test_other_preprocessor_is_found(
    planted: Callable[[str], Pair], name: str, change: dict[str, Any], find: Callable[..., set[str]]
) -> None:
    model, folder = planted(name)
    change_preprocessor(folder, change)
    assert "vision/pixel-values" in find(model, folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llava", {"crop": [24, 23]}, r"4 tiles of \(3, 24, 24\) .* that of the deployment 4 of \(3, 24, 23"),
        *(
            ("qwen2_5_vl", {"patching": change}, r"the model gives .* patches of .* for 4 images, that of the depl")
            for change in ({"most_pixels": 900}, {"frames": 1})
        ),
    ],
)
def test_pixels_of_another_shape_are_named(
    planted: Callable[[str], Pair], name: str, change: dict[str, Any], message: str
) -> None:
    model, folder = planted(name)
    change_preprocessor(folder, change)
    with pytest.raises(ContractError, match=message):
        outcome(model, folder)


@pytest.mark.parametrize(("name", "find"), [("llava", failures), ("qwen2_5_vl", vision_failures)])
def test_one_weight_of_the_vision_tower_is_found(
    planted: Callable[[str], Pair], name: str, find: Callable[..., set[str]]
) -> None:
    model, folder = planted(name)
    spoil_tower(folder)
    assert "vision/image-embeds" in find(model, folder)


@pytest.mark.parametrize(
    ("name", "cutting", "find"), [("smolvlm", Tiling, failures), ("qwen2_5_vl", Patching, image_failures)]
)
def test_tiles_and_patches_in_the_wrong_order_are_found(
    clean: Callable[[str], Pair],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    cutting: Any,
    find: Callable[..., set[str]],
) -> None:
    cut = cutting.cut
    monkeypatch.setattr(cutting, "cut", lambda *arguments: cut(*arguments)[::-1].copy())
    assert {"vision/pixel-values", "base/images/logits"} <= find(*clean(name))


def test_images_that_are_adapted_as_text_are_found(
    clean: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_text(*arguments: Any) -> Any:
        embeds, modality = merge(*arguments)
        return embeds, np.zeros_like(modality)

    monkeypatch.setattr(model_runner, "merge", as_text)
    found = failures(*clean("llava"))
    assert {f"task/{task}/images/logits" for task in ("both", "looks", "words", "asked")} <= found
    assert "base/images/logits" not in found


def test_images_in_the_wrong_order_are_found(clean: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        model_runner, "merge", lambda table, ids, images, base: merge(table, ids, [row[::-1] for row in images], base)
    )
    assert "base/images/logits" in failures(*clean("llava"))


def test_cache_that_takes_one_image_for_another_is_found(
    clean: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower, "digest_bytes", lambda data: "sha256:the same")
    assert "base/images/logits" in failures(*clean("llava"))


def test_model_without_an_image_processor_is_refused(clean: Callable[[str], Pair], tmp_path: Path) -> None:
    model, folder = clean("llava")
    bare = shutil.copytree(model, tmp_path / "model")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ContractError, match="has no image processor and the deployment takes images"):
        outcome(bare, folder)


def test_images_fit_the_context_or_are_left_out(clean: Callable[[str], Pair]) -> None:
    with Deployment.open(clean("llava")[1]) as opened:
        images = ReferenceProcessor(clip_processor(), opened.manifest.base.vision)
        assert make_image_prompts(opened, [[5, 6, 7]], 10, images) is None
        one = make_image_prompts(opened, [[5, IMAGE_TOKEN, 6, 7]], 11, images)
        assert one.rows == [[5, *[IMAGE_TOKEN] * IMAGE_TOKENS, 6]]
        two = make_image_prompts(opened, [[5, 6, 7]], 64, images)
        assert [row.count(IMAGE_TOKEN) for row in two.rows] == [IMAGE_TOKENS, 2 * IMAGE_TOKENS]


def change_vision(folder: Path, **change: Any) -> None:
    base = read_manifest(folder).base
    reseal(folder, base=msgspec.structs.replace(base, vision=msgspec.structs.replace(base.vision, **change)))


@pytest.mark.parametrize("fault", ["columns for rows", "two line ends apart", "no fence at the end"])
def test_wrong_tokens_around_tiles_are_found(planted: Callable[[str], Pair], fault: str) -> None:
    model, folder = planted("smolvlm")
    tiles = read_manifest(folder).base.vision.tiles
    changes: dict[str, Any] = {
        "columns for rows": {"before_tile": tuple(zip(*tiles.before_tile, strict=True))},
        "two line ends apart": {"before_whole": (96, 96, *tiles.before_whole[1:])},
        "no fence at the end": {"end": ()},
    }
    change_vision(folder, tiles=msgspec.structs.replace(tiles, **changes[fault]))
    assert vision_failures(model, folder) == {"vision/tile-tokens"}


def test_missing_tile_of_the_whole_is_found(clean: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Tiling.cut
    monkeypatch.setattr(Tiling, "cut", lambda self, image, grid: cut(self, image, grid)[1:])
    with pytest.raises(ContractError, match=r"the image processor of the model gives .* tiles of .*, that of the dep"):
        vision_failures(*clean("smolvlm"))


@pytest.mark.parametrize(
    "fault",
    [
        lambda positions: positions[..., [0, 2, 1]],
        lambda positions: positions[..., [1, 0, 2]],
        lambda positions: np.arange(positions.shape[1])[None, :, None].repeat(3, axis=2),
    ],
    ids=["columns for rows", "rows for moments", "all in a line"],
)
def test_wrong_positions_of_patches_are_found(
    clean: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], Any]
) -> None:
    monkeypatch.setattr(
        model_runner, "grid_positions", lambda *arguments: np.ascontiguousarray(fault(grid_positions(*arguments)))
    )
    found = image_failures(*clean("qwen2_5_vl"))
    assert {"base/images/logits"} <= found <= {f"base/images/{check}" for check in ("logits", "kl", "top1")}


@pytest.mark.parametrize("place", ["patch_positions", "window_patches", "patch_places"])
def test_wrong_place_in_the_tower_is_found(
    clean: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    inputs = PatchTower.inputs

    def wrong(self: PatchTower, grid: tuple[int, int]) -> Any:
        right = inputs(self, grid)
        changed = {
            "patch_positions": right["patch_positions"][:, ::-1],
            "window_patches": np.where(right["window_patches"] < 0, 0, right["window_patches"]),  # nothing masked
            "patch_places": np.arange(len(right["patch_places"])),  # windows are not undone
        }
        return right | {place: np.ascontiguousarray(changed[place])}

    monkeypatch.setattr(PatchTower, "inputs", wrong)
    assert {"vision/image-embeds", "base/images/logits"} <= image_failures(*clean("qwen2_5_vl"))


def test_other_number_of_positions_of_an_image_is_found(
    clean: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    image_tokens = Vision.image_tokens
    monkeypatch.setattr(Vision, "image_tokens", lambda self, grid: [*image_tokens(self, grid), self.image_token_id])
    assert vision_failures(*clean("qwen2_5_vl")) == {"vision/patch-tokens"}


def test_generation_that_counts_on_wrongly_is_found(
    clean: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text alone shows it: the first token after a prompt would stand where its last one stands."""
    after = static_cache.positions_after
    monkeypatch.setattr(static_cache, "positions_after", lambda positions: after(positions) - 1)
    assert "base/decode-logits" in failures(*clean("qwen2_5_vl"))


def test_prompt_that_is_causal_is_found(
    clean: Callable[[str], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_modules, "prompt_mask", graph_modules.causal_mask)
    found = failures(clean("paligemma")[0], build_vision_deployment(tmp_path, "paligemma").folder)
    assert found >= {"base/logits", "base/images/logits", "base/decode-logits", "task/both/images/logits"}


def test_prompt_whose_last_position_only_itself_sees_is_found(
    clean: Callable[[str], Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def early(inputs_embeds: Any, attention_mask: Any, window: Any) -> Any:
        keys, queries = graph_modules._positions(inputs_embeds, attention_mask)
        in_prompt = (queries[:1] == 0) & (keys < queries[-1:])
        seen = graph_modules._causal(keys, queries, window) | in_prompt
        return graph_modules._additive(seen[None, None] & (attention_mask[:, None, None, :] != 0))

    monkeypatch.setattr(graph_modules, "prompt_mask", early)
    folder = build_vision_deployment(tmp_path, "paligemma").folder
    assert failures(clean("paligemma")[0], folder) >= {"base/logits", "base/decode-logits"}


@pytest.mark.parametrize("in_place", slow_except([True, False], True), ids=["in-place", "growing"])
def test_engine_of_limited_shapes_passes_at_its_corners(
    planted: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    model, folder = planted("paligemma")
    export_base(model, folder, target="portable")
    profile = Profile(batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 8, 24), past=ShapeRange(0, 16, 63))
    for module in (suite, deployment_module):
        monkeypatch.setattr(module, "open_backend", lambda name, threads=None: HostBackend(profile, in_place=in_place))
    report = outcome(model, folder, threads=None, variant="portable")
    assert failed(report.checks) == set()
    profile_limits = {check.name.split("/")[1] for check in report.checks if check.name.startswith("profile/")}
    assert profile_limits == {"batch=1,prompt=1", "batch=1,prompt=24", "batch=3,prompt=1", "batch=3,prompt=8"}
    assert {check.name for check in report.checks} >= CHECKS["paligemma"]


def test_other_form_of_prompts_is_found(planted: Callable[[str], Pair]) -> None:
    model, folder = planted("paligemma")
    change_vision(folder, prompt_form=msgspec.structs.replace(read_manifest(folder).base.vision.prompt_form, after=""))
    assert "base/tokenizer" in failures(model, folder)
