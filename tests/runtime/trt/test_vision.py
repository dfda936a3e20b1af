"""The vision tower as a compiled graph: on main memory as the device, and up to the driver with plans really built."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers.host_device import HAS_TENSOR_SCATTER, HostBackend, HostDevice, HostPlans
from helpers.runtime import Tiny, reseal
from helpers.tiny_models import HIDDEN_SIZE, IMAGE_SIZE, IMAGE_TOKENS, llava
from helpers.vision_deployments import VisionDeployment, build_vision_deployment, picture

from adalink.export.engine.export import export_engine
from adalink.runtime.arrays import Array
from adalink.runtime.deployment import Deployment
from adalink.runtime.device.engine import DeviceEngine
from adalink.runtime.device.gpus import find_gpus
from adalink.runtime.device.vision import DeviceVision
from adalink.runtime.device.workspace import VISION
from adalink.runtime.engine import VisionGraph
from adalink.runtime.errors import (
    BackendError,
    BackendUnavailableError,
    DeploymentError,
    GraphError,
    IntegrityError,
    RequestError,
)
from adalink.runtime.options import OpenOptions
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.vision_base import VisionBase, vision_base
from adalink.runtime.trt.record import read_record

RTX = "tensorrt-rtx"
PROFILE = Profile(
    batch=ShapeRange(1, 1, 2), seq=ShapeRange(1, 8, 16), past=ShapeRange(0, 16, 55), images=ShapeRange(1, 2, 3)
)
GRAPH = "base/vision/model.onnx"


@pytest.fixture(scope="module")
def vision_deployment(tmp_path_factory: pytest.TempPathFactory) -> VisionDeployment:
    return build_vision_deployment(tmp_path_factory.mktemp("vision_deployment"), target="portable")


@pytest.fixture(scope="module")
def built(vision_deployment: VisionDeployment, tmp_path_factory: pytest.TempPathFactory) -> VisionDeployment:
    """The same with an engine of TensorRT-RTX, and so with a plan of the tower."""
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: pip install 'adalink-kit[tensorrt-rtx]'"
    )
    folder = Path(shutil.copytree(vision_deployment.folder, tmp_path_factory.mktemp("built") / "deployment"))
    export_engine(folder, RTX, target=("sm86",), profile=PROFILE)
    return dataclasses.replace(vision_deployment, folder=folder)


@pytest.fixture
def copy(built: VisionDeployment, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built.folder, tmp_path / "deployment"))


def pixels(count: int) -> Array:
    return np.random.default_rng(count).normal(size=(count, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)


def tower(model: Any, values: Array) -> tuple[Array, float]:
    """PyTorch's embeddings, and a limit for another float32 evaluation."""
    found = []
    for own in (model, llava().double()):
        with torch.no_grad():
            given = own.get_image_features(pixel_values=torch.from_numpy(values).to(own.dtype)).pooler_output
        found.append(np.stack([part.double().numpy() for part in given]))
    return found[0], 16 * float(np.abs(found[0] - found[1]).max())


def opened_tower(vision_deployment: VisionDeployment, device: HostDevice, profile: Profile = PROFILE) -> DeviceVision:
    plans = HostPlans({VISION: str(vision_deployment.folder / GRAPH)}, profile)
    return DeviceVision(device, plans, vision_base(read_manifest(vision_deployment.folder).base))


def test_embeddings_are_pytorchs_whatever_the_memory_holds(vision_deployment: VisionDeployment) -> None:
    """Noise on the device, and fewer images after more: nothing of an earlier call shows."""
    device = HostDevice(fresh=0xA5)
    vision = opened_tower(vision_deployment, device)
    held = device.allocated_bytes
    assert held == 3 * (3 * IMAGE_SIZE**2 + IMAGE_TOKENS * HIDDEN_SIZE) * 4
    kept = []
    for count in (3, 1, 2, 3):
        expected, limit = tower(vision_deployment.model, pixels(count))
        received = vision.run(pixels(count))
        assert received.shape == (count, IMAGE_TOKENS, HIDDEN_SIZE)
        assert np.abs(received - expected).max() <= limit < 1e-3
        assert np.abs(received[::-1] - expected).max() > 100 * limit or count == 1
        kept.append((received, received.copy()))
    assert device.allocated_bytes == held
    for received, copied in kept:
        assert np.array_equal(received, copied), "an earlier result was written over"
    vision.close()
    assert device.allocated_bytes == 0


def test_a_deployment_gives_images_to_it_in_calls_that_it_takes(
    vision_deployment: VisionDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    run = DeviceVision.run
    monkeypatch.setattr(DeviceVision, "run", lambda self, values: calls.append(len(values)) or run(self, values))
    host = HostBackend(PROFILE, in_place=HAS_TENSOR_SCATTER)
    images = [[picture(seed) for seed in range(4)], [picture(3)]]
    prompts = ["@@@@ which?", "@ what?"]
    with Deployment(
        vision_deployment.folder, read_manifest(vision_deployment.folder), host, OpenOptions("portable")
    ) as deployment:
        before = host.device.allocated_bytes
        for _ in range(2):
            rows = deployment.generate(prompts, images=images, tasks=["both", "looks"], max_new_tokens=4)
        assert (calls, deployment.images_encoded) == ([3, 1], 4)
        for prompt, own, task, row in zip(prompts, images, ("both", "looks"), rows, strict=True):
            expected = vision_deployment.greedy(deployment.tokenizer.encode(prompt), own, task, 4)
            assert list(row.token_ids) == expected
        assert host.device.allocated_bytes > before
        expected, limit = tower(vision_deployment.model, pixels(5))
        assert np.abs(deployment.encode_images(pixels(5)) - expected).max() <= limit
    assert host.device.allocated_bytes == 0
    with pytest.raises(RequestError, match="the deployment is closed"):
        deployment.encode_images(pixels(1))


def test_a_tower_that_does_not_fit_or_is_anothers_is_refused(
    vision_deployment: VisionDeployment, tmp_path: Path
) -> None:
    with pytest.raises(BackendError, match="out of memory"):
        opened_tower(vision_deployment, HostDevice(limit_bytes=1 << 12))
    with pytest.raises(DeploymentError, match="its profile has no images=: build the engine again"):
        opened_tower(vision_deployment, HostDevice(), msgspec.structs.replace(PROFILE, images=None))
    base = read_manifest(vision_deployment.folder).base
    assert base.vision is not None
    plans = HostPlans({VISION: str(vision_deployment.folder / GRAPH)}, PROFILE)
    for change, words in (
        ({"vision": msgspec.structs.replace(base.vision, image_size=(32, 24))}, r"inputs are .*\(-1, 3, 32, 24\)"),
        ({"hidden_size": 64}, r"outputs are .*\(-1, 9, 64\)"),
    ):
        with pytest.raises(GraphError, match=f"the vision tower of .*: {words}"):
            DeviceVision(HostDevice(), plans, vision_base(msgspec.structs.replace(base, **change)))


@pytest.mark.parametrize("shape", [(3, IMAGE_SIZE, IMAGE_SIZE), (0, 3, IMAGE_SIZE, IMAGE_SIZE), (1, 3, 8, 8), ()])
def test_pixel_values_of_another_shape_are_refused(
    vision_deployment: VisionDeployment, llama: Tiny, shape: tuple[int, ...]
) -> None:
    with (
        Deployment.open(vision_deployment.folder) as deployment,
        pytest.raises(RequestError, match="pixel_values has the shape"),
    ):
        deployment.encode_images(np.zeros(shape, np.float32))
    with Deployment.open(llama.folder) as deployment, pytest.raises(RequestError, match="without a vision tower"):
        deployment.encode_images(np.zeros(shape, np.float32))


class GraphsOfPlans(HostBackend):
    """Opens on main memory what the plans of an engine were built from, with the profile of its record.

    Attributes:
        asked: files that were to be opened.
    """

    name = RTX

    def __init__(self, folder: Path) -> None:
        super().__init__(read_record(folder / "engines" / RTX).profile, in_place=HAS_TENSOR_SCATTER)
        self.folder = folder
        self.asked: list[str] = []

    def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> DeviceEngine:
        self.asked.append(graph.relative_to(self.folder).as_posix())
        variant = read_record(graph.parent).variant
        own = self.folder / read_manifest(self.folder).variants[variant].graph
        return super().open_engine(own, base, role, table)

    def open_vision(self, graph: Path, base: VisionBase) -> VisionGraph:
        self.asked.append(graph.relative_to(self.folder).as_posix())
        return super().open_vision(self.folder / GRAPH, base)


@pytest.mark.parametrize("is_older", [False, True], ids=["with-plan", "older"])
def test_an_engine_brings_its_tower_and_an_older_one_takes_the_bases(copy: Path, is_older: bool) -> None:
    manifest = read_manifest(copy)
    if is_older:  # as a kit that knew of no such plan has written it
        own = manifest.variants[RTX]
        files = tuple(path for path in own.files if not path.endswith("vision.plan"))
        variants = {**manifest.variants, RTX: msgspec.structs.replace(own, files=files, vision_graph=None)}
        record = msgspec.to_builtins(read_record(copy / "engines" / RTX))
        del record["vision"], record["profile"]["images"]
        (copy / "engines" / RTX / "engine.json").write_bytes(msgspec.json.encode(record))
        reseal(copy, variants=variants)
    backend = GraphsOfPlans(copy)
    with Deployment(copy, read_manifest(copy), backend) as deployment:
        assert backend.asked == [f"engines/{RTX}/engine.plan"]
        deployment.generate(["@what?"], images=[[picture(1)]], max_new_tokens=2)
        assert backend.asked[1:] == [GRAPH if is_older else f"engines/{RTX}/vision.plan"]
        receipt = deployment.receipt()
    assert receipt.unchanged
    assert (f"engines/{RTX}/vision.plan" in receipt.digests) == (not is_older)


def test_a_tower_altered_since_it_was_built_is_not_opened(copy: Path) -> None:
    plan = copy / f"engines/{RTX}/vision.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"vision\.plan has digest"):
        Deployment.open(copy, RTX)


@pytest.mark.skipif(bool(find_gpus().devices), reason="there is a GPU: the tower would simply open")
def test_everything_up_to_the_driver_is_checked(copy: Path) -> None:
    from adalink.runtime.ort.vision import OnnxVisionGraph
    from adalink.runtime.trt.backend import TensorRtBackend

    backend, base = TensorRtBackend(RTX, OnnxVisionGraph), vision_base(read_manifest(copy).base)
    plan, record = copy / f"engines/{RTX}/vision.plan", copy / f"engines/{RTX}/engine.json"
    with pytest.raises(BackendUnavailableError, match=r"backend tensorrt-rtx needs an NVIDIA GPU.*driver"):
        backend.open_vision(plan, base)
    on_cpu = backend.open_vision(copy / GRAPH, base)
    assert on_cpu.run(pixels(1)).shape == (1, IMAGE_TOKENS, HIDDEN_SIZE)
    data = plan.read_bytes()
    plan.write_bytes(bytes(8) + data[8:])
    with pytest.raises(BackendError, match=r"vision\.plan: .* refuses it on this machine: malformed engine"):
        backend.open_vision(plan, base)
    plan.write_bytes(data)
    record.write_bytes(msgspec.json.encode(msgspec.structs.replace(read_record(record.parent), version="1.0")))
    with pytest.raises(BackendError, match=r"built by tensorrt-rtx 1\.0, installed is"):
        backend.open_vision(plan, base)
