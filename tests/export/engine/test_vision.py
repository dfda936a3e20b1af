"""The vision tower is built beside the engine: really built, without a GPU; what cannot be loaded here is inspected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from click.testing import CliRunner
from helpers.engines import RTX, SM86
from helpers.export import MODELS
from helpers.runtime import reseal
from helpers.tiny_models import HIDDEN_SIZE, IMAGE_SIZE, IMAGE_TOKENS, TILE_EDGE, TILE_TOKENS
from helpers.vision_deployments import build_vision_deployment

from adalink.export.adapter.embedder_graph import EMBEDDERS
from adalink.export.base.export import export_base
from adalink.export.engine.export import export_engine
from adalink.export.engine.tensorrt_builder import PlanDraft
from adalink.runtime.builds import builder_calls
from adalink.runtime.errors import BackendError, ConfigError, IntegrityError
from adalink.runtime.profile import ShapeRange, default_profile, parse_profile
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.trt.api import Api
from adalink.runtime.trt.record import read_record
from adalink.tools.cli import main

VISION = "base/vision/model.onnx"
PLAN = f"engines/{RTX}/vision.plan"
# Edge of what the tower takes, positions that it gives, and the likeliest number of a call, by kind of model.
TOWERS = {"image": (IMAGE_SIZE, IMAGE_TOKENS, 1), "tile": (TILE_EDGE, TILE_TOKENS, 1024)}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("towers")
    return {
        "image": build_vision_deployment(root / "image", target="portable", dtype="float16").folder,
        "tile": build_vision_deployment(root / "tile", "idefics3", target="portable").folder,
    }


@pytest.fixture
def deployment(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(originals[kind], tmp_path / kind))


def contents(folder: Path) -> dict[str, str]:
    own = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): digest_file(path) for path in own}


def adalink(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", TOWERS)
def test_the_network_is_the_towers_in_float32(api: Api, originals: dict[str, Path], kind: str) -> None:
    folder, (edge, tokens, likeliest) = originals[kind], TOWERS[kind]
    base, path = read_manifest(folder).base, folder / VISION
    images = default_profile(base).images
    assert images == ShapeRange(1, likeliest, 512 * 512 // edge**2)
    with PlanDraft(api, onnx.load(str(path), load_external_data=False), path, "vision.plan") as draft:
        draft.add_profile({"images": images})
        (profile,) = draft.profiles
        taken = [tuple(shape) for shape in profile.get_shape("pixel_values")]
        assert taken == [(count, 3, edge, edge) for count in (1, likeliest, images.max)]
        network = draft.network
        given, source = network.get_output(0), network.get_input(0)
        assert (network.num_inputs, network.num_outputs) == (1, 1)
        assert (source.name, source.dtype, tuple(source.shape)) == (
            "pixel_values",
            api.trt.float32,
            (-1, 3, edge, edge),
        )
        assert (given.name, given.dtype) == ("image_embeds", api.trt.float32)
        assert tuple(given.shape) == (-1, tokens, HIDDEN_SIZE)
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        products = [layer for layer in layers if layer.type.name in ("MATRIX_MULTIPLY", "CONVOLUTION")]
        assert len(products) > 8
        assert {layer.get_output(0).dtype for layer in products} == {api.trt.float32}
        assert network.get_flag(api.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert not draft.config.get_flag(api.trt.BuilderFlag.TF32)


@pytest.mark.parametrize("kind", TOWERS)
def test_a_plan_of_the_tower_is_added_and_nothing_else_changes(
    api: Api, deployment: Callable[[str], Path], kind: str
) -> None:
    folder = deployment(kind)
    before, calls = contents(folder), builder_calls()
    manifest = export_engine(folder, RTX, target=SM86, profile="batch=1:1:2,seq=1:8:16,past=0:16:40,images=1:2:3")
    assert builder_calls() - calls == len(EMBEDDERS) + 2
    after = contents(folder)
    assert {path for path in before if after.get(path) != before[path]} == {"manifest.json"}
    assert {path for path in after.keys() - before.keys() if "front-" not in path} == {
        f"engines/{RTX}/{name}" for name in ("engine.plan", "engine.json", "vision.plan")
    }
    verify_files(folder, manifest)
    assert read_manifest(folder) == manifest
    own = manifest.variants[RTX]
    assert own.vision_graph == PLAN
    assert PLAN in own.files
    assert manifest.variants["portable"].vision_graph is None
    record = read_record(folder / "engines" / RTX)
    assert record.profile.images == ShapeRange(1, 2, 3)
    assert record.vision is not None
    assert record.vision.onnx_sha256 == before[VISION]
    assert record.vision.weights_sha256 == before[f"{VISION}.data"]
    assert record.vision.plan_bytes == (folder / PLAN).stat().st_size > (folder / f"{VISION}.data").stat().st_size
    assert 0 < record.vision.build_seconds < 600
    verdict = api.validity((folder / PLAN).read_bytes())
    assert verdict is not None
    assert "malformed engine" not in verdict[1]


def test_a_base_of_text_alone_has_none(api: Api, tmp_path: Path) -> None:
    base = export_base(MODELS["llama"](), tmp_path, target="portable").base
    assert default_profile(base).images is None
    with pytest.raises(ConfigError, match=r"images=1:1:2, but .* takes no images: leave images= out"):
        parse_profile("images=1:1:2", base)
    manifest = export_engine(tmp_path, RTX, target=SM86)
    assert manifest.variants[RTX].vision_graph is None
    assert read_record(tmp_path / "engines" / RTX).vision is None


def test_a_profile_may_leave_the_tower_out(deployment: Callable[[str], Path]) -> None:
    folder = deployment("image")
    profile = msgspec.structs.replace(default_profile(read_manifest(folder).base), images=None)
    assert export_engine(folder, RTX, target=SM86, profile=profile).variants[RTX].vision_graph is None
    assert not (folder / PLAN).exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [("2:2:4", "an image may come alone: begin it at 1"), ("1:3:2", "rising order from 1"), ("0:1:2", "from 1")],
)
def test_wrong_numbers_of_images_are_refused(originals: dict[str, Path], text: str, words: str) -> None:
    base = read_manifest(originals["image"]).base
    with pytest.raises(ConfigError, match=words):
        parse_profile(f"images={text}", base)
    profile = parse_profile("images=1:2:4", base)
    assert parse_profile(str(profile), base) == profile


def test_a_tower_that_cannot_be_built_leaves_the_deployment_as_it_was(deployment: Callable[[str], Path]) -> None:
    folder = deployment("tile")
    model = onnx.load(str(folder / VISION), load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Softmaximum"
    (folder / VISION).write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match=r"base/vision/model\.onnx.*altered"):
        export_engine(folder, RTX, target=SM86)
    reseal(folder)
    before = contents(folder)
    with pytest.raises(BackendError, match=r"vision.plan: its graph cannot be parsed: tensorrt_rtx.*Softmaximum"):
        export_engine(folder, RTX, target=SM86)
    assert contents(folder) == before
    assert not (folder / "engines").exists()


def test_the_command_and_inspect_tell_of_it(deployment: Callable[[str], Path]) -> None:
    folder = deployment("image")
    made = adalink("export", "engine", folder, "--backend", RTX, "--target", "sm86", "--profile", "images=1:1:2")
    assert made.exit_code == 0, made.output
    assert f"{PLAN}, the vision tower, " in made.stdout
    assert "images=1:1:2" in made.stdout
    again = adalink("export", "engine", folder, "--backend", RTX, "--target", "sm86", "--replace", "--json")
    record = read_record(folder / f"engines/{RTX}.2")
    assert json.loads(again.stdout)["vision"] == msgspec.to_builtins(record.vision)
    plan = json.loads(adalink("inspect", folder / f"engines/{RTX}.2/vision.plan", "--json").stdout)
    assert plan["role"] == "vision tower"
    assert plan["record"]["vision"]["onnx_sha256"] == digest_file(folder / VISION)

    def is_as_built() -> bool:
        described = json.loads(adalink("inspect", folder, "--json").stdout)
        return bool(described["variants"][RTX]["engine"]["built_from_what_is_there"])

    assert is_as_built()
    model = onnx.load(str(folder / VISION), load_external_data=False)
    model.doc_string = "another"
    (folder / VISION).write_bytes(model.SerializeToString())
    reseal(folder)
    assert not is_as_built()
