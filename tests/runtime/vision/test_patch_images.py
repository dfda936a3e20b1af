"""Images that keep their shape, end to end: as PyTorch answers, whatever is in a batch and wherever pictures stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runtime import random_adapter, reseal, write_adapter
from helpers.tiny_models import IMAGE_TOKEN, qwen2_5_vl, qwen2_vl
from helpers.vision_deployments import SeeingPatches, build_seeing_patches, picture

from adalink.export.adapter.export import export_adapter
from adalink.export.engine.graph import check_buildable
from adalink.runtime import Deployment
from adalink.runtime.errors import BackendError, ConfigError, ContractError, IntegrityError, RequestError
from adalink.runtime.storage.vision_schema import PatchTower

NEW = 8
# Of pieces in three rows and five columns, in eight and two, in one and nine, and of two by two.
A, B, C, D = (picture(seed, *size) for seed, size in enumerate(((25, 41), (60, 17), (3, 60), (9, 9)), start=1))
PROMPTS: list[tuple[str, list[Any]]] = [("@what?", [A]), ("a @ b @c", [B, C]), ("no picture", []), ("@.", [D])]
ROWS = [(prompt, images, task) for prompt, images in PROMPTS for task in (None, "words", "looks", "both", "asked")]


@pytest.fixture(scope="module", params=["qwen2", "qwen2.5", "qwen2.5 portable"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SeeingPatches:
    model = qwen2_vl() if request.param == "qwen2" else qwen2_5_vl()
    target = "portable" if request.param.endswith("portable") else "onnxruntime-cpu"
    return build_seeing_patches(tmp_path_factory.mktemp("kept"), model, target=target)


@pytest.fixture(scope="module")
def opened(kept: SeeingPatches) -> Any:
    with Deployment.open(kept.folder) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def expected(kept: SeeingPatches, opened: Deployment) -> list[list[int]]:
    return [kept.greedy(opened.tokenizer.encode(prompt), images, task, NEW) for prompt, images, task in ROWS]


def test_rows_of_all_kinds_in_one_batch_are_what_pytorch_generates(
    kept: SeeingPatches, opened: Deployment, expected: list[list[int]]
) -> None:
    prompts, images, tasks = zip(*ROWS, strict=True)
    found = opened.generate(prompts, images=images, tasks=tasks, max_new_tokens=NEW)
    assert [list(row.token_ids) for row in found] == expected
    lengths = [kept.inputs(opened.tokenizer.encode(prompt), own)["input_ids"].shape[1] for prompt, own, _ in ROWS]
    assert [row.prompt_tokens for row in found] == lengths
    for (prompt, own, task), made in zip(ROWS, expected, strict=True):  # alone, and given with all placeholders
        whole = kept.inputs(opened.tokenizer.encode(prompt), own)["input_ids"][0].tolist()
        (row,) = opened.generate([whole], images=[own or None], tasks=task, max_new_tokens=NEW)
        assert list(row.token_ids) == made


def test_logits_are_pytorchs(kept: SeeingPatches, opened: Deployment) -> None:
    for prompt, images, task in ROWS:
        tokens = opened.tokenizer.encode(prompt)
        plain, limit = kept.logits(tokens, images, task)
        ids = kept.inputs(tokens, images)["input_ids"].numpy()
        received = opened.run(input_ids=ids, images=[images], tasks=task)["logits"][0]
        assert np.abs(received - plain).max() <= limit, (prompt, task)
        assert limit < 1e-2
        if len(images) == 1:  # the limit finds another picture of the same grid
            far = opened.run(input_ids=ids, images=[[np.asarray(images[0])[::-1]]], tasks=task)["logits"][0]
            assert np.abs(far - plain).max() > 10 * limit


def test_padding_on_either_side_changes_nothing(kept: SeeingPatches, opened: Deployment) -> None:
    ids = kept.inputs(opened.tokenizer.encode("a@b"), [A])["input_ids"].numpy()
    alone = opened.run(input_ids=ids, images=[[A]])["logits"][0]
    for before, after in ((3, 0), (0, 3)):
        wide, mask = (np.pad(values, ((0, 0), (before, after))) for values in (ids, np.ones_like(ids)))
        received = opened.run(input_ids=wide, attention_mask=mask, images=[[A]])["logits"][0]
        np.testing.assert_allclose(received[before : before + len(alone)], alone, atol=1e-4)


def test_what_follows_a_picture_counts_from_its_longer_edge(kept: SeeingPatches, opened: Deployment) -> None:
    """Against whole runs of PyTorch: where a prompt ends in a picture its ``generate`` counts on axis by axis."""
    (row,) = opened.generate(["ab@"], images=[[C]], max_new_tokens=NEW)
    inputs = kept.inputs(opened.tokenizer.encode("ab@"), [C])
    prompt = inputs.pop("input_ids")
    for place, token in enumerate(row.token_ids):
        ids = torch.cat([prompt, torch.tensor([row.token_ids[:place]], dtype=torch.int64)], dim=1)
        types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, place))
        own = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
        with torch.no_grad():
            assert int(kept.model(**inputs | own).logits[0, -1].argmax()) == token
    assert row.token_ids


def test_the_encoder_runs_once_for_a_picture_and_knows_grids_apart(kept: SeeingPatches) -> None:
    grey = np.full((16, 40, 3), 90, np.uint8)  # on its side it has the very same patches
    with Deployment.open(kept.folder) as deployment:
        for task in (None, "words", "looks"):
            deployment.generate(["@x@"], images=[[A, np.asarray(A)]], tasks=task, max_new_tokens=1)
        assert deployment.images_encoded == 1
        ids = [[5, *[IMAGE_TOKEN] * 10, 7]]
        lying, upright = (
            deployment.run(input_ids=ids, images=[[own]])["logits"] for own in (grey, grey.transpose(1, 0, 2))
        )
        assert deployment.images_encoded == 3
        assert np.abs(lying - upright).max() > 0.01


def test_kept_prefixes_are_those_of_one_picture_under_one_adapter(
    kept: SeeingPatches, opened: Deployment, expected: list[list[int]]
) -> None:
    if opened.variant.target == "portable":
        with pytest.raises(RequestError, match="cannot go on from a kept prefix"):
            Deployment.open(kept.folder, prefix_cache_bytes=1 << 20)
        return
    grey = np.full((16, 40, 3), 90, np.uint8)
    with Deployment.open(kept.folder, prefix_cache_bytes=1 << 20) as deployment:
        for _ in range(2):
            for (prompt, images, task), made in zip(ROWS, expected, strict=True):
                (row,) = deployment.generate([prompt], images=[images], tasks=task, max_new_tokens=NEW)
                assert list(row.token_ids) == made
        prompts, images, tasks = zip(*ROWS, strict=True)
        found = deployment.generate(prompts, images=images, tasks=tasks, max_new_tokens=NEW)
        assert [list(row.token_ids) for row in found] == expected
        for image in (grey, grey.transpose(1, 0, 2), grey):  # one prompt and the same patches, in another grid
            (row,) = deployment.generate(["@what?"], images=[[image]], max_new_tokens=NEW)
            (plain,) = opened.generate(["@what?"], images=[[image]], max_new_tokens=NEW)
            assert row == plain


def test_embeddings_of_the_callers_own_stand_in_a_line(kept: SeeingPatches, opened: Deployment) -> None:
    embeds = opened.input_embeddings([[5, 6, 7, 8]])
    ids = opened.run(input_ids=[[5, 6, 7, 8]])["logits"]
    np.testing.assert_allclose(opened.run(inputs_embeds=embeds)["logits"], ids, atol=1e-5)


def test_a_soft_prompt_is_refused(kept: SeeingPatches, tmp_path: Path, opened: Deployment) -> None:
    base = opened.manifest.base
    adapter = random_adapter(
        base.fingerprint, base.hidden_size, 3, rank=4, activation="gelu", bias=False, scope="all", soft_tokens=2
    )
    folder = write_adapter(tmp_path / "soft", adapter)
    for add in (lambda: export_adapter(folder, kept.folder), lambda: opened.add_task(folder)):
        with pytest.raises(ContractError, match=r"has a soft prompt, and positions of .* before which none can"):
            add()


def test_encode_wants_the_patches_of_one_grid(kept: SeeingPatches, opened: Deployment) -> None:
    pixels = kept.inputs([IMAGE_TOKEN], [A])["pixel_values"].numpy()
    received = opened.encode_images(pixels, (3, 5))
    np.testing.assert_allclose(received, opened.input_embeddings([[IMAGE_TOKEN] * 15], images=[[A]])[0], atol=1e-5)
    for grid in (None, (5, 5)):
        with pytest.raises(RequestError, match=r"pixel_values has the shape \(60, 96\) and grid is .* all its patches"):
            opened.encode_images(pixels, grid)


def test_a_float16_base_takes_images(tmp_path: Path) -> None:
    """Compared with its own float32: positions are far from exact in 11 bits, so angles must be computed in 24."""
    half, whole = (
        build_seeing_patches(tmp_path / dtype, qwen2_5_vl(), dtype=dtype) for dtype in ("float16", "float32")
    )
    ids = whole.inputs([5, IMAGE_TOKEN, *range(40, 90)], [A])["input_ids"].numpy()
    with Deployment.open(half.folder) as narrow, Deployment.open(whole.folder) as wide:
        given = [own.run(input_ids=ids, images=[[A]], tasks="both")["logits"][0] for own in (narrow, wide)]
        turned = wide.run(input_ids=ids, images=[[np.asarray(A)[::-1]]], tasks="both")["logits"][0]
    assert given[0].dtype == np.float16
    far = np.abs(given[0].astype(np.float32) - given[1]).max()
    assert far < 0.02 * np.abs(given[1]).max()
    assert far < np.abs(turned - given[1]).max() / 10


def test_other_backends_are_refused(kept: SeeingPatches, opened: Deployment) -> None:
    assert opened.variant.backends == ("onnxruntime-cpu",)
    with pytest.raises(ConfigError, match="follow the grid of a picture, which engines do not take"):
        check_buildable(opened.manifest.base)


def test_another_preprocessor_is_refused(tmp_path: Path) -> None:
    own = build_seeing_patches(tmp_path, qwen2_5_vl())
    path = own.folder / "base" / "vision" / "preprocessor.json"
    path.write_text(path.read_text().replace('"edge": 4', '"edge": 5'))
    reseal(own.folder)
    message = r"cuts pictures into patches by .*edge=5.*, the manifest expects \(\(8, 8\), 2\)"
    with Deployment.open(own.folder) as deployment, pytest.raises(IntegrityError, match=message):
        deployment.generate(["@"], images=[[A]], max_new_tokens=1)


def test_a_tower_that_gets_wrong_patches_says_so(opened: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = PatchTower.inputs
    monkeypatch.setattr(PatchTower, "inputs", lambda self, grid: inputs(self, (grid[0] + 1, grid[1])))
    with pytest.raises(BackendError, match=r"base/vision/model\.onnx"):
        opened.generate(["@"], images=[[picture(77, 25, 41)]], max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        (["no"], [[A]], "prompt 0 has 0 placeholders .* and 1 images: write one .* or all 15 positions"),
        (["@@"], [[A]], "prompt 0 has 2 placeholders .* and 1 images"),
        (["@"], None, "prompt 0 has 1 placeholders .* and 0 images"),
        (["@"], [[A, B]], "prompt 0 has 1 placeholders .* and 2 images: .* all 31 positions"),
        (["@"], [[b"rubbish"]], r"images\[0\]\[0\] is not an image that Pillow can read"),
        (["@" * 18], [[A] * 18], "the sequence would have .* positions, .* at most 256"),
        (["@"], [[np.zeros((2, 500, 3), np.uint8)]], "the image is 500 x 2 pixels, expected the longer edge"),
        ([[IMAGE_TOKEN] * 7 + [5] + [IMAGE_TOKEN] * 8], [[A]], "row 0: the placeholders of image 0 do not stand"),
    ],
)
def test_a_request_that_cannot_be_answered(opened: Deployment, prompts: Any, images: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        opened.generate(prompts, images=images, max_new_tokens=2)


def test_run_wants_every_placeholder(opened: Deployment) -> None:
    with pytest.raises(
        RequestError, match=r"row 0 has 4 placeholders .* and 1 images: expected 15 placeholders, 1 for"
    ):
        opened.run(input_ids=[[IMAGE_TOKEN] * 4], images=[[A]])


@pytest.mark.parametrize("seen", [0, 7])
def test_an_image_that_is_masked_out_is_refused(opened: Deployment, seen: int) -> None:
    ids = [[5, *[IMAGE_TOKEN] * 15, 6]]
    mask = [[1, *[1] * seen, *[0] * (16 - seen)]]
    with pytest.raises(RequestError, match=r"row 0: the placeholders of image 0 do not .* none of them out by atten"):
        opened.run(input_ids=ids, attention_mask=mask, images=[[A]])
