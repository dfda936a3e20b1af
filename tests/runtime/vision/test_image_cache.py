"""Images are encoded once, and what is kept of them and of prompts is of one image under one adapter."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import IMAGE_TOKEN, IMAGE_TOKENS, TILE_EDGE, TILE_TOKENS
from helpers.vision_deployments import (
    NEW_TOKENS,
    PATCH_DEPLOYMENTS,
    VISION_DEPLOYMENTS,
    A,
    B,
    C,
    VisionCases,
    VisionDeployment,
)
from helpers.vision_families import TILES

from adalink.runtime import Deployment
from adalink.runtime.errors import RequestError
from adalink.runtime.ort.vision import OnnxVisionGraph
from adalink.runtime.storage import manifest
from adalink.runtime.vision import tower
from adalink.runtime.vision.placeholders import ImageEmbeds, prompt_cache_keys

# On its side it has the very same patches.
GREY = np.full((16, 40, 3), 90, np.uint8)
# One prompt with an image, and images for it.
IMAGES: dict[str, tuple[str, list[Any]]] = {
    "llava": ("@what?", [A, B, C]),
    **dict.fromkeys(TILES, ("<image>what?", [A, B, np.asarray(A)[::-1]])),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), ("@what?", [GREY, GREY.transpose(1, 0, 2), GREY])),
}


@pytest.mark.parametrize("name", VISION_DEPLOYMENTS)
def test_encoder_runs_once_however_many_tasks_look_at_an_image(vision_cases: VisionCases, name: str) -> None:
    made = vision_cases[name].made
    mark, tasks = made.family.placeholder, [None, "words", "looks", "both"]
    with Deployment.open(made.folder) as deployment:
        deployment.generate([mark] * 4, images=[[A]] * 4, tasks=tasks, max_new_tokens=1)
        assert deployment.images_encoded == 1
        for task in tasks:
            deployment.generate([f"{mark}again"], images=[[np.asarray(A)]], tasks=task, max_new_tokens=1)
            deployment.generate([f"{mark}x{mark}"], images=[[A, np.asarray(A)]], tasks=task, max_new_tokens=1)
        assert deployment.images_encoded == 1, "the same image, given in another way"
        deployment.generate([f"{mark}x{mark}x{mark}"], images=[[A, B, B]], max_new_tokens=1)
        deployment.generate([mark] * 2, images=[[B], [A]], max_new_tokens=1)
        assert deployment.images_encoded == 2


@pytest.mark.parametrize("name", PATCH_DEPLOYMENTS)
def test_encoder_knows_grids_of_the_same_patches_apart(vision_cases: VisionCases, name: str) -> None:
    with Deployment.open(vision_cases[name].made.folder) as deployment:
        ids = [[5, *[IMAGE_TOKEN] * 10, 7]]
        lying, upright = (
            deployment.run(input_ids=ids, images=[[image]])["logits"] for image in (GREY, GREY.transpose(1, 0, 2))
        )
        assert deployment.images_encoded == 2
        assert np.abs(lying - upright).max() > 0.01


def test_cache_keeps_to_its_budget_and_forgets_the_least_recently_used(vision_deployment: VisionDeployment) -> None:
    one = IMAGE_TOKENS * vision_deployment.model.config.text_config.hidden_size * 4

    def encoded(deployment: Deployment, *images: Any) -> int:
        before = deployment.images_encoded
        deployment.generate(["@" * len(images)], images=[images], max_new_tokens=1)
        return deployment.images_encoded - before

    with Deployment.open(vision_deployment.folder, image_cache_bytes=2 * one + 1) as deployment:
        assert encoded(deployment, A, B) == 2
        assert encoded(deployment, A) == 0
        assert encoded(deployment, C) == 1, "B goes, which was used before A"
        assert encoded(deployment, A) == 0
        assert encoded(deployment, B) == 1
    with Deployment.open(vision_deployment.folder, image_cache_bytes=0) as deployment:
        assert encoded(deployment, A, A) == 1
        assert encoded(deployment, A) == 1


@pytest.mark.parametrize("name", TILES)
def test_cache_of_tiles_keeps_to_its_budget(vision_cases: VisionCases, name: str) -> None:
    made = vision_cases[name].made
    tile = TILE_TOKENS * made.model.config.text_config.hidden_size * 4
    with Deployment.open(made.folder, image_cache_bytes=9 * tile) as deployment:
        for image, encoded in ((B, 1), (B, 1), (A, 2), (A, 3), (B, 3)):  # seven tiles fit, ten do not
            deployment.generate(["<image>"], images=[[image]], max_new_tokens=1)
            assert deployment.images_encoded == encoded


def test_kept_embeddings_keep_no_neighbours(vision_deployment: VisionDeployment) -> None:
    with Deployment.open(vision_deployment.folder) as deployment:
        deployment.generate(["@@", "@"], images=[[A, B], [C]], max_new_tokens=1)
        kept = [held.value for held in deployment._vision._kept.entries.values()]
        assert len(kept) == 3
        assert sum(embeds.nbytes for embeds in kept) == deployment._vision._kept.size
        assert all(embeds.base is None or embeds.base.nbytes == embeds.nbytes for embeds in kept)


@pytest.mark.parametrize("count", range(1, 9))
def test_tower_is_given_no_more_than_it_takes(count: int) -> None:
    """Whatever is left for the last call, the result is that of all at once: of whole numbers, so on every CPU."""
    rng, calls = np.random.default_rng(count), list[int]()
    weights = rng.integers(-99, 100, size=(3 * 4 * 4, 10)).astype(np.float32)

    class Tower:
        most_images = 3

        def run(self, pixel_values: np.ndarray) -> np.ndarray:
            calls.append(len(pixel_values))
            return (pixel_values.reshape(len(pixel_values), -1) @ weights).reshape(-1, 2, 5)

    images = rng.integers(-99, 100, size=(count, 3, 4, 4)).astype(np.float32)
    found = tower._TileTower(Tower()).run(images, (0, 0))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, Tower().run(images))
    assert calls == [*[3] * (count // 3), *([count % 3] if count % 3 else []), count]


@pytest.mark.parametrize("name", TILES)
def test_tower_takes_few_tiles_at_a_time(vision_cases: VisionCases, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = vision_cases[name]
    ids = case.ids("<image><image>", [B, A])
    expected = case.opened.input_embeddings(ids, images=[[B, A]])
    monkeypatch.setattr(manifest, "_PIXELS_AT_ONCE", 3 * TILE_EDGE**2)
    calls: list[int] = []
    run = OnnxVisionGraph.run
    monkeypatch.setattr(OnnxVisionGraph, "run", lambda self, tiles: calls.append(len(tiles)) or run(self, tiles))
    with Deployment.open(case.made.folder) as deployment:
        np.testing.assert_allclose(deployment.input_embeddings(ids, images=[[B, A]]), expected, atol=1e-5)
    assert calls == [3, 3, 3, 3, 3, 2]


def test_threads_that_ask_at_once_share_one_run(vision_deployment: VisionDeployment) -> None:
    with Deployment.open(vision_deployment.folder) as deployment:
        with ThreadPoolExecutor(4) as pool:
            ask = [pool.submit(deployment.generate, ["@"], images=[[A]], max_new_tokens=2) for _ in range(8)]
        assert len({answer.result()[0].token_ids for answer in ask}) == 1
        assert deployment.images_encoded == 1


@pytest.mark.parametrize("name", IMAGES)
def test_kept_prefixes_are_those_of_one_image_under_one_adapter(vision_cases: VisionCases, name: str) -> None:
    case, (prompt, other_images) = vision_cases[name], IMAGES[name]
    with Deployment.open(case.made.folder, prefix_cache_bytes=1 << 20) as deployment:
        for _ in range(2):
            for (text, images, task), tokens in zip(case.rows, case.expected, strict=True):
                (row,) = deployment.generate([text], images=[images], tasks=task, max_new_tokens=NEW_TOKENS)
                assert list(row.token_ids) == tokens
        texts, images, tasks = zip(*case.rows, strict=True)
        found = deployment.generate(texts, images=images, tasks=tasks, max_new_tokens=NEW_TOKENS)
        assert [list(row.token_ids) for row in found] == case.expected
        for image in other_images:  # one prompt, other images
            for task in ("looks", None):
                request: dict[str, Any] = {"images": [[image]], "tasks": task, "max_new_tokens": NEW_TOKENS}
                (row,) = deployment.generate([prompt], **request)
                assert [row] == case.opened.generate([prompt], **request)
                assert list(row.token_ids) == case.made.greedy(prompt, [image], task, NEW_TOKENS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("paligemma", "attends in both directions: what its beginning leaves depends on its end"),
        ("qwen2_5_vl portable", "cannot go on from a kept prefix"),
    ],
)
def test_prefixes_that_cannot_be_kept_are_refused(vision_cases: VisionCases, name: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Deployment.open(vision_cases[name].made.folder, prefix_cache_bytes=1 << 20)


def test_cache_keys_of_prefixes_tell_images_and_adapters_apart(vision_cases: VisionCases) -> None:
    tokens = [5, *[IMAGE_TOKEN] * IMAGE_TOKENS, 6]
    vision = vision_cases["llava"].opened.manifest.base.vision
    one, other = (ImageEmbeds(digest, np.zeros((IMAGE_TOKENS, 1))) for digest in ("sha256:a", "sha256:b"))
    keys = prompt_cache_keys(tokens, [one], "", vision)
    assert keys[[0, -1]].tolist() == [5, 6]
    assert (keys[1:-1] < 0).all()
    assert len(set(keys[1:-1].tolist())) == 1
    np.testing.assert_array_equal(keys, prompt_cache_keys(tokens, [one], "", vision))
    for changed in (
        prompt_cache_keys(tokens, [other], "", vision),
        prompt_cache_keys(tokens, [one], "sha256:c", vision),
    ):
        assert (changed[1:-1] != keys[1:-1]).all()
    assert prompt_cache_keys(tokens, [], "", vision).tolist() == tokens


def test_negative_budget_is_refused(vision_deployment: VisionDeployment) -> None:
    with pytest.raises(RequestError, match="image_cache_bytes is -1, expected a whole number of at least 0"):
        Deployment.open(vision_deployment.folder, image_cache_bytes=-1)
