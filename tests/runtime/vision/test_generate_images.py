"""Images in prompts, end to end: as PyTorch answers with the same adapters, whatever is in a batch together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.host_device import HostBackend
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_models import IMAGE_TOKEN, IMAGE_TOKENS, TILE_EDGE, TILE_IMAGE_TOKEN, TILE_TOKENS
from helpers.vision import tile_processor
from helpers.vision_deployments import (
    EACH_TASK,
    GRIDS,
    NEW_TOKENS,
    PATCH_DEPLOYMENTS,
    VISION_DEPLOYMENTS,
    A,
    VisionCases,
    VisionDeployments,
    build_vision_deployment,
)
from helpers.vision_families import FAMILIES, TILES, extend

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.export.engine.graph import check_buildable
from adalink.runtime import Deployment
from adalink.runtime.errors import ConfigError, ContractError, RequestError
from adalink.runtime.options import OpenOptions
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest


@pytest.mark.parametrize("name", VISION_DEPLOYMENTS)
def test_rows_of_all_kinds_in_one_batch_are_what_pytorch_generates(vision_cases: VisionCases, name: str) -> None:
    case = vision_cases[name]
    prompts, images, tasks = zip(*case.rows, strict=True)
    found = case.opened.generate(prompts, images=images, tasks=tasks, max_new_tokens=NEW_TOKENS)
    assert [list(row.token_ids) for row in found] == case.expected
    lengths = [case.ids(prompt, own).shape[1] for prompt, own, _ in case.rows]
    assert [row.prompt_tokens for row in found] == lengths
    assert len(set(lengths)) == len(case.prompts)
    first = {"llava": len("what?") + IMAGE_TOKENS, "paligemma": IMAGE_TOKENS + len("^caption en$")}
    assert lengths[0] == first.get(name, lengths[0])
    for start in {"llava": (0, 5, 15), "paligemma": (0, 5, 10)}.get(name, ()):  # every task says something else
        assert len({tuple(tokens) for tokens in case.expected[start : start + 5]}) >= 4


@pytest.mark.parametrize("name", VISION_DEPLOYMENTS)
def test_each_row_alone_and_by_its_token_ids_is_what_pytorch_generates(vision_cases: VisionCases, name: str) -> None:
    case = vision_cases[name]
    for (prompt, images, task), tokens in zip(case.rows, case.expected, strict=True):
        # A prompt of PaliGemma is more than its text: its tokens are those of the whole.
        short = prompt if name == "paligemma" else case.opened.tokenizer.encode(prompt)
        for given in (short, case.ids(prompt, images)[0].tolist()):
            (row,) = case.opened.generate([given], images=[images or None], tasks=task, max_new_tokens=NEW_TOKENS)
            assert list(row.token_ids) == tokens


@pytest.mark.parametrize("name", VISION_DEPLOYMENTS)
def test_logits_are_those_of_pytorch(vision_cases: VisionCases, name: str) -> None:
    case = vision_cases[name]
    for prompt, images, task in case.rows:
        plain, limit = case.made.logits(prompt, images, task)
        ids = case.ids(prompt, images)
        received = case.opened.run(input_ids=ids, images=[images], tasks=task)["logits"][0]
        assert np.abs(received - plain).max() <= limit, (prompt, task)
        assert limit < 1e-2
        # The limit finds other images of the same size, another task, and a prompt that is causal.
        others = [np.asarray(image)[::-1] for image in images]
        if images:
            far = case.opened.run(input_ids=ids, images=[others], tasks=task)["logits"][0]
            assert np.abs(far - plain).max() > 10 * limit
        if images and task != "both":
            far = case.opened.run(input_ids=ids, images=[images], tasks="both")["logits"][0]
            assert np.abs(far - plain).max() > 10 * limit
        if name == "paligemma":
            inputs = case.made.inputs(prompt, images)
            with case.made.adapted(case.made.model, task) as model, torch.no_grad():
                causal = model(**inputs | {"token_type_ids": torch.ones_like(inputs["input_ids"])}).logits[0].numpy()
            assert np.abs(causal - plain).max() > 10 * limit


@pytest.mark.parametrize("name", TILES)
def test_limit_finds_tiles_in_another_order(vision_cases: VisionCases, name: str) -> None:
    case = vision_cases[name]
    inputs = case.made.inputs("<image>", [A])
    received = case.opened.run(input_ids=inputs["input_ids"].numpy(), images=[[A]])["logits"][0]
    for order in ([9, *range(9)], [0, 3, 6, 1, 4, 7, 2, 5, 8, 9]):
        with torch.no_grad():
            wrong = case.made.model(**inputs | {"pixel_values": inputs["pixel_values"][:, order]}).logits[0].numpy()
        assert np.abs(received - wrong).max() > 10 * case.made.logits("<image>", [A], None)[1]


@pytest.mark.parametrize("name", VISION_DEPLOYMENTS)
def test_padding_on_either_side_changes_nothing(vision_cases: VisionCases, name: str) -> None:
    case = vision_cases[name]
    prompts = case.prompts[:4]
    rows, images = [case.ids(*prompt)[0] for prompt in prompts], [own for _, own in prompts]
    longest = max(map(len, rows)) + 2
    for left in (True, False):
        ids, mask = np.zeros((4, longest), np.int64), np.zeros((4, longest), np.int64)
        for index, row in enumerate(rows):
            where = slice(longest - len(row), None) if left else slice(len(row))
            ids[index, where], mask[index, where] = row, 1
        found = case.opened.run(input_ids=ids, attention_mask=mask, images=images, tasks=list(EACH_TASK[1:]))["logits"]
        for index, row in enumerate(rows):
            alone = case.opened.run(input_ids=row[None], images=[images[index]], tasks=EACH_TASK[1 + index])["logits"][
                0
            ]
            np.testing.assert_allclose(found[index][mask[index] != 0], alone, atol=1e-5)


def test_modality_without_an_adapter_passes_bit_for_bit(vision_cases: VisionCases) -> None:
    case = vision_cases["llava"]
    ids = case.ids("ab@cd", [A])
    is_image = ids[0] == IMAGE_TOKEN
    embeds = {task: case.opened.input_embeddings(ids, images=[[A]], tasks=task)[0] for task in EACH_TASK[:4]}
    np.testing.assert_array_equal(embeds["words"][is_image], embeds[None][is_image])
    np.testing.assert_array_equal(embeds["looks"][~is_image], embeds[None][~is_image])
    assert (embeds["looks"][is_image] != embeds[None][is_image]).any(axis=-1).all()
    assert (embeds["both"] != embeds[None]).any(axis=-1).all()
    with torch.no_grad():
        pixels = case.made.inputs([IMAGE_TOKEN], [A])["pixel_values"]
        reference = case.made.model.get_image_features(pixel_values=pixels).pooler_output[0].numpy()
    np.testing.assert_allclose(embeds[None][is_image], reference, atol=1e-4)


def test_image_adapter_leaves_rows_without_images_to_the_base_model(vision_cases: VisionCases) -> None:
    case = vision_cases["llava"]
    made = dict(zip([(prompt, task) for prompt, _, task in case.rows], case.expected, strict=True))
    assert made["no picture", "looks"] == made["no picture", None]
    (row,) = case.opened.generate(["no picture"], tasks="looks", max_new_tokens=NEW_TOKENS)
    assert list(row.token_ids) == made["no picture", None]


def test_placeholders_without_images_are_tokens_like_any_other(vision_cases: VisionCases) -> None:
    case, ids = vision_cases["llava"], np.array([[5, IMAGE_TOKEN, 7]])
    with case.made.adapted(case.made.model, "both") as model, torch.no_grad():
        reference = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(case.opened.run(input_ids=ids, tasks="both")["logits"], reference, atol=1e-3)


def test_float16_base_of_one_size_embeds_images(vision_cases: VisionCases, tmp_path: Path) -> None:
    half, opened = build_vision_deployment(tmp_path, dtype="float16"), vision_cases["llava"].opened
    ids = half.inputs("ab@cd", [A])["input_ids"].numpy()
    with Deployment.open(half.folder) as deployment:
        for task in (None, "both"):
            received = deployment.input_embeddings(ids, images=[[A]], tasks=task)
            wide = opened.input_embeddings(ids, images=[[A]], tasks=task)
            assert received.dtype == np.float16
            np.testing.assert_allclose(received.astype(np.float32), wide, rtol=2e-3, atol=2e-3)
        assert deployment.generate(["@?"], images=[[A]], tasks="both", max_new_tokens=2)[0].token_ids


def test_float16_base_of_paligemma_is_close_to_float32(vision_cases: VisionCases, tmp_path: Path) -> None:
    half, case = build_vision_deployment(tmp_path, "paligemma", dtype="float16"), vision_cases["paligemma"]
    ids = case.ids("which?", [A])
    with Deployment.open(half.folder) as deployment:
        received = deployment.run(input_ids=ids, images=[[A]], tasks="both")["logits"]
        wide = case.opened.run(input_ids=ids, images=[[A]], tasks="both")["logits"]
        np.testing.assert_allclose(received.astype(np.float32), wide, atol=3e-2)


def test_float16_base_of_patches_is_close_to_float32(vision_cases: VisionCases, tmp_path: Path) -> None:
    """Positions are far from exact in 11 bits, so angles must be computed in 24."""
    half, case, image = (
        build_vision_deployment(tmp_path, "qwen2_5_vl", dtype="float16"),
        vision_cases["qwen2_5_vl"],
        GRIDS[0],
    )
    ids = case.ids([5, IMAGE_TOKEN, *range(40, 90)], [image])
    with Deployment.open(half.folder) as narrow:
        both = [own.run(input_ids=ids, images=[[image]], tasks="both")["logits"][0] for own in (narrow, case.opened)]
    turned = case.opened.run(input_ids=ids, images=[[np.asarray(image)[::-1]]], tasks="both")["logits"][0]
    assert both[0].dtype == np.float16
    far = np.abs(both[0].astype(np.float32) - both[1]).max()
    assert far < 0.02 * np.abs(both[1]).max()
    assert far < np.abs(turned - both[1]).max() / 10


def test_all_zero_tile_is_a_tile(tmp_path: Path) -> None:
    """Where values are not normalised black is zero, which the model's own code takes for padding, and fails."""
    family = FAMILIES["smolvlm"]
    model, processor = family.make_model(), tile_processor(do_normalize=False)
    export_base(model, tmp_path, tokenizer=family.make_tokenizer(), image_processor=processor)
    black = np.zeros((48, 48, 3), np.uint8)
    black[:16, :16] = 255
    with Deployment.open(tmp_path) as deployment:
        (length,) = [row.prompt_tokens for row in deployment.generate(["<image>"], images=[[black]], max_new_tokens=1)]
        assert length == 10 * TILE_TOKENS + 9 * 2 + 2 + 1 + 2 + 1
        ids = [[TILE_IMAGE_TOKEN] * 10 * TILE_TOKENS]
        received = deployment.input_embeddings(ids, images=[[black]])[0].reshape(10, TILE_TOKENS, -1)
    with torch.no_grad():
        states = model.model.vision_model(torch.zeros(1, 3, TILE_EDGE, TILE_EDGE)).last_hidden_state
        expected = model.model.connector(states)[0].numpy()
    for tile in received[1:9]:
        np.testing.assert_allclose(tile, expected, atol=1e-4)
    assert np.abs(received[0] - expected).max() > 0.1


def test_soft_prompt_is_part_of_what_all_of_a_prompt_sees(vision_cases: VisionCases, tmp_path: Path) -> None:
    made = vision_cases["paligemma"].made
    base = read_manifest(made.folder).base
    adapter = random_adapter(
        base.fingerprint, base.hidden_size, 3, rank=0, activation="identity", bias=False, scope="all", soft_tokens=3
    )
    inputs = made.inputs("no picture", [])
    ids = inputs["input_ids"]
    with torch.no_grad():
        soft = torch.from_numpy(adapter.weights["soft_prompt"])[None]
        embeds = torch.cat([soft, made.model.get_input_embeddings()(ids)], dim=1)
        types = torch.zeros(embeds.shape[:2], dtype=torch.int64)
        plain = made.model(inputs_embeds=embeds, token_type_ids=types).logits[0, 3:].numpy()
        alone = made.model(**inputs).logits[0].numpy()
    with Deployment.open(made.folder) as deployment:
        deployment.add_task(write_adapter(tmp_path / "soft", adapter))
        received = deployment.run(input_ids=ids.numpy(), tasks="soft")["logits"][0]
    np.testing.assert_allclose(received, plain, atol=1e-4)
    assert np.abs(plain - alone).max() > 0.1


def test_first_position_sees_the_last(vision_cases: VisionCases) -> None:
    """Of a prompt; what was generated before does not see what comes after."""
    ids = np.array([[1, 30, 40, 50, 96]])
    other = ids.copy()
    other[0, -2] = 51
    first, second = (vision_cases["paligemma"].opened.run(input_ids=own)["logits"][0] for own in (ids, other))
    assert (np.abs(first - second).max(axis=1) > 1e-3).all()


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "growing"])
def test_prompt_goes_in_at_once_on_a_device(
    vision_cases: VisionCases, vision_deployments: VisionDeployments, in_place: bool
) -> None:
    case, folder = vision_cases["paligemma"], vision_deployments["paligemma portable"].folder
    prompts, images, tasks = zip(*case.rows[:15], strict=True)

    def opened(profile: Profile) -> Deployment:
        host = HostBackend(profile, in_place=in_place)
        return Deployment(folder, read_manifest(folder), host, OpenOptions("portable"))

    with opened(
        Profile(batch=ShapeRange(1, 8, 15), seq=ShapeRange(1, 16, 40), past=ShapeRange(0, 16, 55))
    ) as deployment:
        found = deployment.generate(prompts, images=images, tasks=tasks, max_new_tokens=NEW_TOKENS)
        assert [list(row.token_ids) for row in found] == case.expected[:15]
        # More positions than one pass has room for logits.
        ids = np.stack([case.ids(*case.prompts[index])[0][-14:] for index in (0, 1)] * 2)
        found = deployment.run(input_ids=ids)["logits"]
        for row, logits in zip(ids, found, strict=True):
            np.testing.assert_allclose(logits, deployment.run(input_ids=row[None])["logits"][0], atol=1e-5)
    with opened(Profile(batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 4, 12), past=ShapeRange(0, 8, 55))) as deployment:
        assert deployment.generate(["short"], max_new_tokens=2)
        with pytest.raises(RequestError, match=r"21 positions long .* takes 12 of so many rows .* must go in at once"):
            deployment.generate(prompts[:1], images=images[:1], max_new_tokens=2)
        with pytest.raises(RequestError, match="must go in at once"):
            deployment.run(input_ids=[[5] * 13])


@pytest.mark.parametrize("name", PATCH_DEPLOYMENTS)
def test_what_follows_an_image_counts_from_its_longer_edge(vision_cases: VisionCases, name: str) -> None:
    """Against whole runs of PyTorch: where a prompt ends in an image its ``generate`` counts on axis by axis."""
    case, image = vision_cases[name], GRIDS[2]
    (row,) = case.opened.generate(["ab@"], images=[[image]], max_new_tokens=NEW_TOKENS)
    inputs = case.made.inputs("ab@", [image])
    for place, token in enumerate(row.token_ids):
        whole = extend(inputs, torch.tensor([row.token_ids[:place]], dtype=torch.int64))
        with torch.no_grad():
            assert int(case.made.model(**whole).logits[0, -1].argmax()) == token
    assert row.token_ids


@pytest.mark.parametrize("name", PATCH_DEPLOYMENTS)
def test_embeddings_of_the_caller_stand_in_a_line(vision_cases: VisionCases, name: str) -> None:
    opened = vision_cases[name].opened
    embeds = opened.input_embeddings([[5, 6, 7, 8]])
    ids = opened.run(input_ids=[[5, 6, 7, 8]])["logits"]
    np.testing.assert_allclose(opened.run(inputs_embeds=embeds)["logits"], ids, atol=1e-5)


@pytest.mark.parametrize("name", PATCH_DEPLOYMENTS)
def test_soft_prompt_before_patches_is_refused(vision_cases: VisionCases, name: str, tmp_path: Path) -> None:
    case = vision_cases[name]
    base = case.opened.manifest.base
    adapter = random_adapter(
        base.fingerprint, base.hidden_size, 3, rank=4, activation="gelu", bias=False, scope="all", soft_tokens=2
    )
    folder = write_adapter(tmp_path / "soft", adapter)
    for add in (lambda: export_adapter(folder, case.made.folder), lambda: case.opened.add_task(folder)):
        with pytest.raises(ContractError, match=r"has a soft prompt, and positions of .* before which none can"):
            add()


@pytest.mark.parametrize("name", PATCH_DEPLOYMENTS)
def test_patches_are_encoded_with_their_grid(vision_cases: VisionCases, name: str) -> None:
    opened, image = vision_cases[name].opened, GRIDS[0]
    pixels = vision_cases[name].made.inputs([IMAGE_TOKEN], [image])["pixel_values"].numpy()
    embeds = opened.input_embeddings([[IMAGE_TOKEN] * 15], images=[[image]])[0]
    np.testing.assert_allclose(opened.encode_images(pixels, (3, 5)), embeds, atol=1e-5)
    for grid in (None, (5, 5)):
        with pytest.raises(RequestError, match=r"pixel_values has the shape \(60, 96\) and grid is .* all its patches"):
            opened.encode_images(pixels, grid)


@pytest.mark.parametrize("name", PATCH_DEPLOYMENTS)
def test_other_backends_of_patches_are_refused(vision_cases: VisionCases, name: str) -> None:
    opened = vision_cases[name].opened
    assert opened.variant.backends == ("onnxruntime-cpu",)
    with pytest.raises(ConfigError, match="follow the grid of an image, which engines do not take"):
        check_buildable(opened.manifest.base)
