"""PaliGemma end to end: prompts in its own form, seen in both directions, beside other rows and under other tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.host_device import HostBackend
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_models import IMAGE_TOKENS, PREFIX_IMAGE_TOKEN
from helpers.vision_deployments import SeeingPrefix, build_seeing_prefix, picture

from adalink.runtime import Deployment
from adalink.runtime.errors import RequestError
from adalink.runtime.options import OpenOptions
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest

NEW = 8
A, B, C = (picture(seed, height, width) for seed, height, width in ((1, 30, 41), (2, 50, 24), (3, 24, 24)))
# What people write, and its images: as many in front as there are, or where the placeholders stand; one is no text.
PROMPTS: list[tuple[str, list[Any]]] = [
    ("caption en", [A]),
    ("which?", [B, A]),
    ("a<image>b <image>c", [A, C]),
    ("no picture", []),
    ("", [C]),
]
TASKS = (None, "words", "looks", "both", "asked")
ROWS = [(prompt, images, task) for prompt, images in PROMPTS for task in TASKS]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> SeeingPrefix:
    own = build_seeing_prefix(tmp_path_factory.mktemp("prefix"))
    build_seeing_prefix(own.folder.parent / "again", target="portable")
    return own


@pytest.fixture(scope="module")
def opened(seeing: SeeingPrefix) -> Any:
    with Deployment.open(seeing.folder) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def expected(seeing: SeeingPrefix) -> list[list[int]]:
    return [seeing.greedy(prompt, images, task, NEW) for prompt, images, task in ROWS]


def test_rows_of_all_kinds_in_one_batch_are_what_pytorch_generates(
    opened: Deployment, expected: list[list[int]]
) -> None:
    prompts, images, tasks = zip(*ROWS, strict=True)
    found = opened.generate(prompts, images=images, tasks=tasks, max_new_tokens=NEW)
    assert [list(row.token_ids) for row in found] == expected
    assert found[0].prompt_tokens == IMAGE_TOKENS + len("^caption en$")
    for start in (0, 5, 10):  # with images, every task says something else
        assert len({tuple(made) for made in expected[start : start + 5]}) >= 4


def test_each_row_alone_and_by_its_token_ids(
    seeing: SeeingPrefix, opened: Deployment, expected: list[list[int]]
) -> None:
    for (prompt, images, task), made in zip(ROWS, expected, strict=True):
        ids = seeing.inputs(prompt, images)["input_ids"][0].tolist()
        for written in (prompt, ids):
            (row,) = opened.generate([written], images=[images or None], tasks=task, max_new_tokens=NEW)
            assert list(row.token_ids) == made


def test_logits_are_pytorchs(seeing: SeeingPrefix, opened: Deployment) -> None:
    for prompt, images, task in ROWS:
        plain, limit = seeing.logits(prompt, images, task)
        inputs = seeing.inputs(prompt, images)
        received = opened.run(input_ids=inputs["input_ids"].numpy(), images=[images], tasks=task)["logits"][0]
        assert np.abs(received - plain).max() <= limit, (prompt, task)
        assert limit < 1e-2
        with seeing.adapted(seeing.model, task) as model, torch.no_grad():  # the limit finds a prompt that is causal
            causal = model(**inputs | {"token_type_ids": torch.ones_like(inputs["input_ids"])}).logits[0].numpy()
        assert np.abs(causal - plain).max() > 10 * limit


def test_a_soft_prompt_is_part_of_what_all_of_a_prompt_sees(seeing: SeeingPrefix, tmp_path: Path) -> None:
    base = read_manifest(seeing.folder).base
    adapter = random_adapter(
        base.fingerprint, base.hidden_size, 3, rank=0, activation="identity", bias=False, scope="all", soft_tokens=3
    )
    inputs = seeing.inputs("no picture", [])
    ids = inputs["input_ids"]
    with torch.no_grad():
        soft = torch.from_numpy(adapter.weights["soft_prompt"])[None]
        embeds = torch.cat([soft, seeing.model.get_input_embeddings()(ids)], dim=1)
        types = torch.zeros(embeds.shape[:2], dtype=torch.int64)
        plain = seeing.model(inputs_embeds=embeds, token_type_ids=types).logits[0, 3:].numpy()
        alone = seeing.model(**inputs).logits[0].numpy()
    with Deployment.open(seeing.folder) as deployment:
        deployment.add_task(write_adapter(tmp_path / "soft", adapter))
        received = deployment.run(input_ids=ids.numpy(), tasks="soft")["logits"][0]
    np.testing.assert_allclose(received, plain, atol=1e-4)
    assert np.abs(plain - alone).max() > 0.1


def test_padding_on_either_side_says_nothing(seeing: SeeingPrefix, opened: Deployment) -> None:
    rows = [seeing.inputs(prompt, images)["input_ids"][0].numpy() for prompt, images in PROMPTS[:4]]
    longest, pictures = max(map(len, rows)) + 2, [images for _, images in PROMPTS[:4]]
    for left in (True, False):
        ids, mask = np.zeros((4, longest), np.int64), np.zeros((4, longest), np.int64)
        for index, row in enumerate(rows):
            where = slice(longest - len(row), None) if left else slice(len(row))
            ids[index, where], mask[index, where] = row, 1
        found = opened.run(input_ids=ids, attention_mask=mask, images=pictures, tasks=list(TASKS[1:]))["logits"]
        for index, row in enumerate(rows):
            alone = opened.run(input_ids=row[None], images=[pictures[index]], tasks=TASKS[1 + index])["logits"][0]
            np.testing.assert_allclose(found[index][mask[index] != 0], alone, atol=1e-5)


def test_a_first_position_sees_the_last(opened: Deployment) -> None:
    """Of a prompt; what was generated before does not see what comes after."""
    ids = np.array([[1, 30, 40, 50, 96]])
    other = ids.copy()
    other[0, -2] = 51
    first, second = (opened.run(input_ids=own)["logits"][0] for own in (ids, other))
    assert (np.abs(first - second).max(axis=1) > 1e-3).all()


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "growing"])
def test_on_a_device_a_prompt_goes_in_at_once(seeing: SeeingPrefix, expected: list[list[int]], in_place: bool) -> None:
    folder = seeing.folder.parent / "again" / "deployment"
    prompts, images, tasks = zip(*ROWS[:15], strict=True)
    profile = Profile(batch=ShapeRange(1, 8, 15), seq=ShapeRange(1, 16, 40), past=ShapeRange(0, 16, 55))
    with Deployment(
        folder, read_manifest(folder), HostBackend(profile, in_place=in_place), OpenOptions("portable")
    ) as deployment:
        found = deployment.generate(prompts, images=images, tasks=tasks, max_new_tokens=NEW)
        assert [list(row.token_ids) for row in found] == expected[:15]
        ids = [seeing.inputs(prompt, images)["input_ids"][0].numpy() for prompt, images, _ in (ROWS[0], ROWS[5])]
        ids = np.stack([own[-14:] for own in ids] * 2)  # more positions than one pass has room for logits
        found = deployment.run(input_ids=ids)["logits"]
        for row, logits in zip(ids, found, strict=True):
            np.testing.assert_allclose(logits, deployment.run(input_ids=row[None])["logits"][0], atol=1e-5)
    small = Profile(batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 4, 12), past=ShapeRange(0, 8, 55))
    with Deployment(
        folder, read_manifest(folder), HostBackend(small, in_place=in_place), OpenOptions("portable")
    ) as deployment:
        assert deployment.generate(["short"], max_new_tokens=2)
        with pytest.raises(RequestError, match=r"21 positions long .* takes 12 of so many rows .* must go in at once"):
            deployment.generate(prompts[:1], images=images[:1], max_new_tokens=2)
        with pytest.raises(RequestError, match="must go in at once"):
            deployment.run(input_ids=[[5] * 13])


def test_prefixes_are_not_kept(seeing: SeeingPrefix) -> None:
    with pytest.raises(RequestError, match="attends in both directions: what its beginning leaves depends on its end"):
        Deployment.open(seeing.folder, prefix_cache_bytes=1 << 20)


def test_a_float16_base(tmp_path: Path, seeing: SeeingPrefix, opened: Deployment) -> None:
    half = build_seeing_prefix(tmp_path, dtype="float16")
    ids = seeing.inputs("which?", [A])["input_ids"].numpy()
    with Deployment.open(half.folder) as deployment:
        received = deployment.run(input_ids=ids, images=[[A]], tasks="both")["logits"]
        wide = opened.run(input_ids=ids, images=[[A]], tasks="both")["logits"]
        np.testing.assert_allclose(received.astype(np.float32), wide, atol=3e-2)


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        (["<image>a"], None, r"prompt 0 has 1 placeholders \(token 98\) and 0 images"),
        (["<image><image>a"], [[A]], "prompt 0 has 2 placeholders .* and 1 images"),
        (["<image>a"], [[A, B]], "prompt 0 has 1 placeholders .* and 2 images"),
        ([[5, 6]], [[A]], "prompt 0 has 0 placeholders .* and 1 images"),
        (["a", "b"], [None, [A, b"rubbish"]], r"images\[1\]\[1\] is not an image that Pillow can read"),
        (["a" * 60], [[A]], "the sequence would have"),
        (["a"], "cat.png", "images is a str and there are 1 rows"),
    ],
)
def test_a_request_that_cannot_be_answered(opened: Deployment, prompts: Any, images: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        opened.generate(prompts, images=images, max_new_tokens=2)


def test_run_wants_every_placeholder(opened: Deployment) -> None:
    with pytest.raises(RequestError, match=r"row 0 has 1 placeholders .* and 1 images: expected 9 placeholders"):
        opened.run(input_ids=[[PREFIX_IMAGE_TOKEN, 6]], images=[[A]])
