"""Images in front of an engine whose memory stays on a device, with main memory as the device (test_device_engine)."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from helpers.host_device import HostBackend
from helpers.vision import clip_processor
from helpers.vision_deployments import VisionDeployment, build_vision_deployment, picture

from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from adalink.runtime.options import OpenOptions
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest

PROFILE = Profile(
    batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 4, 5), past=ShapeRange(0, 8, 55), images=ShapeRange(1, 1, 2)
)
NEW = 6
ROWS = [("@what?", [picture(1)]), ("a @b@ c", [picture(2, 50, 24), picture(1)]), ("no picture", [])]
TASKS = [None, "words", "looks", "both", "asked"]


@pytest.fixture(scope="module")
def vision_deployment(tmp_path_factory: pytest.TempPathFactory) -> VisionDeployment:
    own = build_vision_deployment(tmp_path_factory.mktemp("device"))
    export_base(own.model, own.folder, target="portable", image_processor=clip_processor())
    return own


def opened(folder: Path, host: HostBackend) -> Deployment:
    return Deployment(folder, read_manifest(folder), host, OpenOptions("portable"))


@pytest.fixture(params=[True, False], ids=["in-place", "growing"])
def host(request: pytest.FixtureRequest) -> HostBackend:
    """With the vision tower on the device, and without a plan of it: then it stays with ONNX Runtime."""
    profile = PROFILE if request.param else msgspec.structs.replace(PROFILE, images=None)
    return HostBackend(profile, in_place=request.param)


def test_generation_is_pytorchs(vision_deployment: VisionDeployment, host: HostBackend) -> None:
    prompts, images = zip(*ROWS, strict=True)
    with opened(vision_deployment.folder, host) as deployment:
        for tasks in (TASKS[:3], TASKS[2:], ["asked", "words", None], *([task] * 3 for task in TASKS)):
            found = deployment.generate(prompts, images=images, tasks=tasks, max_new_tokens=NEW)
            for (prompt, own), task, row in zip(ROWS, tasks, found, strict=True):
                expected = vision_deployment.greedy(deployment.tokenizer.encode(prompt), own, task, NEW)
                assert list(row.token_ids) == expected, (prompt, task)
        assert deployment.images_encoded == 2


@pytest.mark.parametrize("task", TASKS)
def test_logits_are_pytorchs(vision_deployment: VisionDeployment, host: HostBackend, task: str | None) -> None:
    with opened(vision_deployment.folder, host) as deployment:
        for prompt, images in ROWS:
            tokens = deployment.tokenizer.encode(prompt)
            plain, limit = vision_deployment.logits(tokens, images, task)
            ids = vision_deployment.inputs(tokens, images)["input_ids"].numpy()
            received = deployment.run(input_ids=ids, images=[images], tasks=task)["logits"][0]
            assert np.abs(received - plain).max() <= limit


def test_tiles_in_front_of_a_device(tmp_path: Path) -> None:
    tiled = build_vision_deployment(tmp_path, "idefics3", target="portable")
    profile = Profile(
        batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 16, 40), past=ShapeRange(0, 64, 150), images=ShapeRange(1, 4, 4)
    )
    rows = [("<image>what?", [picture(1)]), ("a <image> b <image>", [picture(2, 50, 24), picture(3, 7, 100)])]
    prompts, images = zip(*rows, strict=True)
    with opened(tiled.folder, HostBackend(profile, in_place=True)) as deployment:
        for tasks in ((None, "both"), ("looks", "asked")):
            found = deployment.generate(prompts, images=images, tasks=tasks, max_new_tokens=NEW)
            for (prompt, own), task, row in zip(rows, tasks, found, strict=True):
                assert list(row.token_ids) == tiled.greedy(prompt, own, task, NEW), (prompt, task)
