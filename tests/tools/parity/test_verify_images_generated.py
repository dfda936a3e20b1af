"""`adalink verify` generates with images: every class passes, on a device too, and faults only steps show are found."""

from __future__ import annotations

import msgspec
import pytest
from helpers.host_device import HAS_TENSOR_SCATTER, HostBackend
from helpers.quick import slow_except
from helpers.vision_deployments import build_vision_deployment
from helpers.vision_families import FAMILIES

from adalink.runtime import deployment as deployment_module
from adalink.runtime import model_runner, text_generator
from adalink.runtime.device.vision import DeviceVision
from adalink.runtime.generation.row import Row
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.tasks.adapter_mapping import NO_ADAPTER
from adalink.runtime.vision.placeholders import merge
from adalink.tools.parity import suite
from adalink.tools.parity.checks.generation import Generator
from adalink.tools.parity.checks.vision import make_image_prompts, reference_processor
from adalink.tools.parity.suite import VerifyOptions, verify

CLASSES = ("llava", "idefics3", "smolvlm")
TASKS = ("words", "looks", "both", "asked")


def make(root, name):
    deployment = build_vision_deployment(root, name, target="portable")
    return FAMILIES[name].save(root / "model", deployment.model), deployment.folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return make(tmp_path_factory.mktemp("llava"), "llava")


def outcome(model, folder):
    report = verify(folder, str(model), {}, VerifyOptions(threads=1, quick=True))
    assert not report.skipped
    return {check.name: check for check in report.checks}


def failures(model, folder):
    return {name for name, check in outcome(model, folder).items() if not check.passed}


@pytest.mark.parametrize("name", slow_except(CLASSES, "llava"))
def test_every_class_is_compared_as_it_generates(name, tmp_path):
    found = outcome(*make(tmp_path, name))
    assert not {own for own, check in found.items() if not check.passed}
    labels = ["base", *(f"task/{task}" for task in TASKS), "mixed"]
    assert {f"{label}/images/{kind}" for label in labels for kind in ("decode-logits", "generation")} <= found.keys()
    rows = {label: int(found[f"{label}/images/generation"].detail.split("of ")[1].split()[0]) for label in labels}
    assert (rows["base"], rows["mixed"]) == (3, 8)


def test_prompts_are_as_people_write_them_and_two_have_images(clean, monkeypatch):
    model, folder = clean
    seen = []
    generate = Generator.generate
    monkeypatch.setattr(
        Generator,
        "generate",
        lambda self, prompts, tasks, steps, image_prompts=None, stop=(): (
            seen.append((prompts, tasks, image_prompts)) or generate(self, prompts, tasks, steps, image_prompts, stop)
        ),
    )
    outcome(model, folder)
    vision = read_manifest(folder).base.vision
    mixed = [entry for entry in seen if entry[2] is not None and isinstance(entry[1], list)]
    alone = [entry for entry in seen if entry[2] is not None and not isinstance(entry[1], list)]
    assert [tasks for _, tasks, _ in alone] == [None, "asked", "both", "looks", "words"]
    (prompts, tasks, image_prompts), again = mixed  # whole, and with rows that end apart
    assert (prompts, tasks, image_prompts) == again
    assert len(set(tasks)) == 5
    assert [prompt.count(vision.image_token_id) for prompt in prompts] == [1, 2, 0] * 2 + [1, 2]
    assert [len(images) for images in image_prompts.images] == [1, 2, 0] * 2 + [1, 2]
    assert [pixels is None for pixels in image_prompts.pixels] == [False, False, True] * 2 + [False, False]


def test_a_placeholder_that_is_generated_ends_the_comparison(clean):
    """PyTorch runs over the whole row at once and would look for an image there."""
    model, folder = clean
    with deployment_module.Deployment.open(folder) as opened:
        vision = opened.manifest.base.vision
        image_prompts = make_image_prompts(opened, [[5, 6, 7]], 32, reference_processor(str(model), vision)).with_text(
            [5, 6]
        )
        generator = Generator(opened, suite.open_backend("onnxruntime-cpu"), "portable")
        free = generator.generate(image_prompts.prompts, "words", 8, image_prompts)
        said = free[0].tokens[3]
        first = free[0].tokens.index(said)
        vision = msgspec.structs.replace(vision, image_token_id=said)
        generator._base = msgspec.structs.replace(generator._base, vision=vision)
        cut = generator.generate(image_prompts.prompts, "words", 8, image_prompts)
        generator.close()
    assert cut[0].tokens == free[0].tokens[: first + 1]
    assert len(cut[0].logits) == first + 1
    assert cut[2].tokens == free[2].tokens, "a row without images goes on"


def test_images_given_to_each_others_rows(clean, monkeypatch):
    monkeypatch.setattr(model_runner, "merge", lambda embeds, ids, images, base: merge(embeds, ids, images[::-1], base))
    found = failures(*clean)
    assert {f"{label}/images/decode-logits" for label in ("base", "task/both", "mixed")} <= found
    assert not {name for name in found if not name.endswith(("images/decode-logits", "images/generation"))}


def test_tokens_that_are_not_adapted_behind_images(clean, monkeypatch):
    def plain(prompt, make_sequence, chooser, tasks, options):
        return Row(prompt, make_sequence, chooser, NO_ADAPTER if prompt.images else tasks, options)

    monkeypatch.setattr(text_generator, "Row", plain)
    found = failures(*clean)
    assert {f"{label}/images/decode-logits" for label in ("task/words", "task/both", "mixed")} <= found
    own = ("task/words/images/", "task/both/images/", "mixed/images/", "mixed/ends/images/")
    assert not {name for name in found if not name.startswith(own)}


# More images a call than are looked at anywhere but at its corner.
PROFILE = Profile(
    batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 8, 16), past=ShapeRange(0, 16, 63), images=ShapeRange(1, 2, 6)
)


@pytest.fixture
def on_a_device(clean, monkeypatch):
    """Main memory is the device: tower and language model."""
    for module in (suite, deployment_module):
        monkeypatch.setattr(
            module, "open_backend", lambda name, threads=None: HostBackend(PROFILE, in_place=HAS_TENSOR_SCATTER)
        )
    return clean


def test_a_tower_on_a_device_passes(on_a_device):
    found = outcome(*on_a_device)
    assert not {name for name, check in found.items() if not check.passed}
    assert {"profile/images=1/image-embeds", "profile/images=6/image-embeds"} <= found.keys()


def test_a_tower_on_a_device_that_is_wrong_for_full_calls_shows_at_the_corner(on_a_device, monkeypatch):
    run = DeviceVision.run

    def short(self, values):
        embeds = run(self, values)
        embeds[5:] = 0
        return embeds

    monkeypatch.setattr(DeviceVision, "run", short)
    assert failures(*on_a_device) == {"profile/images=6/image-embeds"}


def test_a_tower_on_a_device_that_gives_an_images_embeddings_for_the_next(on_a_device, monkeypatch):
    run = DeviceVision.run
    monkeypatch.setattr(DeviceVision, "run", lambda self, values: run(self, values)[[*range(1, len(values)), 0]])
    found = failures(*on_a_device)
    assert "vision/image-embeds" in found
    assert not {name for name in found if "image" not in name}
