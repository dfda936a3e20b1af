"""On an NVIDIA GPU: every backend that is installed, against PyTorch. Skipped, with the reason, where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.runtime import TASKS, Tiny, build
from helpers.vision_deployments import build_vision_deployment, picture

from adalink.export.base.export import export_base
from adalink.runtime.backends import open_backend
from adalink.runtime.deployment import Deployment
from adalink.runtime.device.gpus import find_gpus
from adalink.runtime.errors import BackendError, RequestError
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.variants import COMPILED_BACKENDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not find_gpus().devices, reason=f"no NVIDIA GPU: {find_gpus().reason}"),
]

# Wider than on the CPU: where a library goes on in TF32 all the same, products have ten bits of mantissa.
CLOSE = {"rtol": 2e-2, "atol": 2e-2}
PROFILE = Profile(batch=ShapeRange(1, 2, 4), seq=ShapeRange(1, 4, 8), past=ShapeRange(0, 16, 62))
PROMPTS = [[5, 9, 33, 41, 7, 60, 12, 44, 81, 19], [8, 70, 3], [90, 4, 77, 21, 15]]
BACKENDS = ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx")


@pytest.fixture(scope="module", params=BACKENDS)
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Tiny, Deployment]]:
    """A tiny llama on one backend; a backend that refuses this machine is skipped in its own words."""
    name = request.param
    try:
        open_backend(name)
    except BackendError as error:
        pytest.skip(f"{name}: {error}")
    tiny = build("llama", tmp_path_factory.mktemp(name), ("text", "image"))
    export_base(tiny.model, tiny.folder, target="portable", modalities=("text", "image"))
    try:
        if name in COMPILED_BACKENDS:
            from adalink.export.engine.export import export_engine

            export_engine(tiny.folder, name, profile=PROFILE)
        deployment = Deployment.open(tiny.folder, name)
    except BackendError as error:
        pytest.skip(f"{name}: {error}")
    with deployment:
        yield tiny, deployment


@pytest.mark.parametrize("task", [None, *TASKS])
def test_logits_agree_with_pytorch(opened: tuple[Tiny, Deployment], task: str | None) -> None:
    tiny, deployment = opened
    for tokens in PROMPTS:
        logits = deployment.run(input_ids=[tokens], tasks=task)["logits"][0]
        np.testing.assert_allclose(logits, tiny.logits(tokens, task), **CLOSE)


def test_decode_steps_agree_with_a_whole_pass(opened: tuple[Tiny, Deployment]) -> None:
    """A mixed batch, greedy; each token must be within rounding of the likeliest after its own prefix."""
    tiny, deployment = opened
    tasks = ["alpha", None, "prompted"]
    results = deployment.generate(PROMPTS, tasks=tasks, max_new_tokens=20)
    for prompt, task, result in zip(PROMPTS, tasks, results, strict=True):
        made: list[int] = []
        for token in result.token_ids:
            parts = [tiny.embeds(prompt, task)]
            if made:
                parts.append(tiny.embeds(made, None if task == "prompted" else task))
            import torch

            with torch.no_grad():
                logits = tiny.model(inputs_embeds=torch.cat(parts, 1)).logits[0, -1]
            assert logits.max() - logits[token] <= 0.1
            made.append(token)


def test_base_a_b_a_base_is_bit_for_bit_the_same(opened: tuple[Tiny, Deployment]) -> None:
    _, deployment = opened
    tour = [None, "alpha", "beta", "alpha", None]
    outputs = [deployment.run(input_ids=[PROMPTS[0]], tasks=task)["logits"].tobytes() for task in tour]
    assert outputs[0] == outputs[4]
    assert outputs[1] == outputs[3]
    assert len(set(outputs)) == 3
    receipt = deployment.receipt()
    assert receipt.unchanged
    assert receipt.engine_builds == 1


def test_whole_vocabulary_passes_bit_for_bit_without_a_task(opened: tuple[Tiny, Deployment]) -> None:
    tiny, deployment = opened
    ids = np.arange(96)[None]
    assert deployment.input_embeddings(ids).tobytes() == tiny.embeds(ids[0].tolist(), None).numpy().tobytes()


def test_a_task_added_now_runs_without_building(opened: tuple[Tiny, Deployment], tmp_path: Path) -> None:
    tiny, deployment = opened
    before = deployment.receipt()
    deployment.add_task(tiny.sources / "beta", "late")
    try:
        late, beta = (deployment.generate([PROMPTS[1]], tasks=name, max_new_tokens=8) for name in ("late", "beta"))
    finally:
        deployment.remove_task("late")
    assert late == beta
    after = deployment.receipt()
    assert (after.engine_builds, after.builder_calls) == (before.engine_builds, before.builder_calls)


@pytest.mark.parametrize("name", COMPILED_BACKENDS)
def test_the_vision_tower_runs_from_its_plan(name: str, tmp_path: Path) -> None:
    from adalink.export.engine.export import export_engine

    vision_deployment = build_vision_deployment(tmp_path, target="portable")
    try:
        manifest = export_engine(vision_deployment.folder, name, profile="seq=1:8:16,past=0:16:62,images=1:1:2")
        deployment = Deployment.open(vision_deployment.folder, name)
    except BackendError as error:
        pytest.skip(f"{name}: {error}")
    assert manifest.variants[name].vision_graph is not None
    prompt, images = "a @b@ c", [picture(2), picture(1)]
    with deployment:
        tokens = deployment.tokenizer.encode(prompt)
        ids = vision_deployment.inputs(tokens, images)["input_ids"].numpy()
        for task in (None, *vision_deployment.adapters):
            logits = deployment.run(input_ids=ids, images=[images], tasks=task)["logits"][0]
            np.testing.assert_allclose(logits, vision_deployment.logits(tokens, images, task)[0], **CLOSE)
        assert deployment.images_encoded == 2


def test_requests_at_a_time_answer_as_one_by_one(opened: tuple[Tiny, Deployment]) -> None:
    """Some open workspaces and load tasks while others record their steps."""
    _, deployment = opened
    wanted = [(prompt, task, steps) for prompt in PROMPTS for task in (None, *TASKS) for steps in (3, 9)]

    def answer(asked: tuple[list[int], str | None, int]) -> tuple[int, ...]:
        prompt, task, steps = asked
        return deployment.generate([prompt], tasks=task, max_new_tokens=steps)[0].token_ids

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(answer, wanted))
    assert found == [answer(asked) for asked in wanted]


def test_shapes_outside_the_profile_are_named(opened: tuple[Tiny, Deployment]) -> None:
    _, deployment = opened
    assert deployment.profile is not None
    with pytest.raises(RequestError, match=r"inputs_embeds: \d+ rows, this engine takes"):
        deployment.generate([[5]] * (deployment.profile.batch.max + 1), max_new_tokens=2)
