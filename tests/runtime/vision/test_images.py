"""Images in prompts, end to end: as PyTorch answers with the same adapters, whatever is in a batch together."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import IMAGE_TOKEN, IMAGE_TOKENS
from helpers.vision_deployments import Seeing, build_seeing, picture

from adalink.runtime import Deployment
from adalink.runtime.errors import IntegrityError, RequestError
from adalink.runtime.storage.safetensors import as_stored
from adalink.runtime.vision import tower as vision
from adalink.runtime.vision.placeholders import ImageEmbeds, prompt_cache_keys

NEW = 8
A, B, C = (picture(seed, height, width) for seed, height, width in ((1, 30, 41), (2, 50, 24), (3, 24, 24)))
# Prompt, its images and its task: every kind of task on one image, on two, and on none.
PROMPTS: list[tuple[str, list[Any]]] = [("@what?", [A]), ("a @b@ c", [B, A]), ("no picture", []), ("@", [C])]
ROWS = [(prompt, images, task) for prompt, images in PROMPTS for task in (None, "words", "looks", "both", "asked")]


@pytest.fixture(scope="module")
def opened(seeing: Seeing) -> Any:
    with Deployment.open(seeing.folder) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def expected(seeing: Seeing, opened: Deployment) -> list[list[int]]:
    return [seeing.greedy(opened.tokenizer.encode(p), images, task, NEW) for p, images, task in ROWS]


def test_rows_of_all_kinds_in_one_batch_are_what_pytorch_generates(
    opened: Deployment, expected: list[list[int]]
) -> None:
    prompts, images, tasks = zip(*ROWS, strict=True)
    found = opened.generate(prompts, images=images, tasks=tasks, max_new_tokens=NEW)
    assert [list(row.token_ids) for row in found] == expected
    assert found[0].prompt_tokens == len("what?") + IMAGE_TOKENS
    for start in (0, 5, 15):  # with images, every task says something else
        assert len({tuple(made) for made in expected[start : start + 5]}) >= 4


def test_each_row_alone_and_by_its_token_ids(opened: Deployment, expected: list[list[int]]) -> None:
    for (prompt, images, task), made in zip(ROWS, expected, strict=True):
        ids = opened.tokenizer.encode(prompt)
        for tokens in (ids, [t for own in ids for t in [own] * (IMAGE_TOKENS if own == IMAGE_TOKEN else 1)]):
            (row,) = opened.generate([tokens], images=[images or None], tasks=task, max_new_tokens=NEW)
            assert list(row.token_ids) == made


def test_logits_are_pytorchs(seeing: Seeing, opened: Deployment) -> None:
    for prompt, images, task in ROWS:
        tokens = opened.tokenizer.encode(prompt)
        plain, limit = seeing.logits(tokens, images, task)
        ids = seeing.inputs(tokens, images)["input_ids"].numpy()
        received = opened.run(input_ids=ids, images=[images], tasks=task)["logits"][0]
        assert np.abs(received - plain).max() <= limit, (prompt, task)
        assert limit < 1e-2
        if images:  # the limit finds another picture, and another task
            others = [C if image is not C else A for image in images]
            for wrong in ({"images": [others], "tasks": task}, {"images": [images], "tasks": "both"}):
                if wrong["tasks"] != task or wrong["images"] != [images]:
                    far = opened.run(input_ids=ids, **wrong)["logits"][0]
                    assert np.abs(far - plain).max() > 10 * limit


def test_a_modality_without_an_adapter_passes_bit_for_bit(seeing: Seeing, opened: Deployment) -> None:
    ids = seeing.inputs(opened.tokenizer.encode("ab@cd"), [A])["input_ids"].numpy()
    is_image = ids[0] == IMAGE_TOKEN
    embeds = {
        task: opened.input_embeddings(ids, images=[[A]], tasks=task)[0] for task in (None, "words", "looks", "both")
    }
    np.testing.assert_array_equal(embeds["words"][is_image], embeds[None][is_image])
    np.testing.assert_array_equal(embeds["looks"][~is_image], embeds[None][~is_image])
    assert (embeds["looks"][is_image] != embeds[None][is_image]).any(axis=-1).all()
    assert (embeds["both"] != embeds[None]).any(axis=-1).all()
    with torch.no_grad():
        pixels = seeing.inputs([IMAGE_TOKEN], [A])["pixel_values"]
        reference = seeing.model.get_image_features(pixel_values=pixels).pooler_output[0].numpy()
    np.testing.assert_allclose(embeds[None][is_image], reference, atol=1e-4)


def test_the_encoder_runs_once_however_many_tasks_look_at_a_picture(seeing: Seeing) -> None:
    with Deployment.open(seeing.folder) as deployment:
        tasks = [None, "words", "looks", "both"]
        deployment.generate(["@"] * 4, images=[[A]] * 4, tasks=tasks, max_new_tokens=1)
        assert deployment.images_encoded == 1
        for task in tasks:
            deployment.generate(["@ again"], images=[[np.asarray(A)]], tasks=task, max_new_tokens=1)
        assert deployment.images_encoded == 1, "the same picture, given in another way"
        deployment.generate(["@@@"], images=[[A, B, B]], max_new_tokens=1)
        assert deployment.images_encoded == 2


def test_the_cache_keeps_to_its_budget_and_forgets_the_least_recently_used(seeing: Seeing) -> None:
    one = IMAGE_TOKENS * seeing.model.config.text_config.hidden_size * 4

    def encoded(deployment: Deployment, *images: Any) -> int:
        before = deployment.images_encoded
        deployment.generate(["@" * len(images)], images=[images], max_new_tokens=1)
        return deployment.images_encoded - before

    with Deployment.open(seeing.folder, image_cache_bytes=2 * one + 1) as deployment:
        assert encoded(deployment, A, B) == 2
        assert encoded(deployment, A) == 0
        assert encoded(deployment, C) == 1, "B goes, which was used before A"
        assert encoded(deployment, A) == 0
        assert encoded(deployment, B) == 1
    with Deployment.open(seeing.folder, image_cache_bytes=0) as deployment:
        assert encoded(deployment, A, A) == 1
        assert encoded(deployment, A) == 1


def test_kept_embeddings_keep_no_neighbours(seeing: Seeing) -> None:
    with Deployment.open(seeing.folder) as deployment:
        deployment.generate(["@@", "@"], images=[[A, B], [C]], max_new_tokens=1)
        kept = list(deployment._vision._kept.entries.values())
        assert len(kept) == 3
        assert sum(own.nbytes for own in kept) == deployment._vision._kept.size
        assert all(own.base is None or own.base.nbytes == own.nbytes for own in kept)


@pytest.mark.parametrize("count", range(1, 9))
def test_a_tower_is_given_no_more_than_it_takes(count: int) -> None:
    """Whatever is left for the last call, the result is that of all at once: of whole numbers, so on every CPU."""
    rng, calls = np.random.default_rng(count), list[int]()
    weights = rng.integers(-99, 100, size=(3 * 4 * 4, 10)).astype(np.float32)

    class Tower:
        most_images = 3

        def run(self, pixel_values: np.ndarray) -> np.ndarray:
            calls.append(len(pixel_values))
            return (pixel_values.reshape(len(pixel_values), -1) @ weights).reshape(-1, 2, 5)

    pictures = rng.integers(-99, 100, size=(count, 3, 4, 4)).astype(np.float32)
    found = vision._TileTower(Tower()).run(pictures, (0, 0))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, Tower().run(pictures))
    assert calls == [*[3] * (count // 3), *([count % 3] if count % 3 else []), count]


def test_threads_that_ask_at_once_share_one_run(seeing: Seeing) -> None:
    with Deployment.open(seeing.folder) as deployment:
        with ThreadPoolExecutor(4) as pool:
            ask = [pool.submit(deployment.generate, ["@"], images=[[A]], max_new_tokens=2) for _ in range(8)]
        assert len({answer.result()[0].token_ids for answer in ask}) == 1
        assert deployment.images_encoded == 1


def test_kept_prefixes_are_those_of_one_picture_under_one_adapter(seeing: Seeing, expected: list[list[int]]) -> None:
    with Deployment.open(seeing.folder, prefix_cache_bytes=1 << 20) as deployment:
        for _ in range(2):
            for (prompt, images, task), made in zip(ROWS, expected, strict=True):
                (row,) = deployment.generate([prompt], images=[images], tasks=task, max_new_tokens=NEW)
                assert list(row.token_ids) == made
        for image in (A, B, C):  # one prompt, other pictures
            (row,) = deployment.generate(["@what?"], images=[[image]], tasks="looks", max_new_tokens=NEW)
            tokens = deployment.tokenizer.encode("@what?")
            assert list(row.token_ids) == seeing.greedy(tokens, [image], "looks", NEW)


def test_names_of_prefixes(opened: Deployment) -> None:
    tokens = [5, *[IMAGE_TOKEN] * IMAGE_TOKENS, 6]
    vision = opened.manifest.base.vision
    one, other = (ImageEmbeds(digest, np.zeros((IMAGE_TOKENS, 1))) for digest in ("sha256:a", "sha256:b"))
    names = prompt_cache_keys(tokens, [one], "", vision)
    assert names[[0, -1]].tolist() == [5, 6]
    assert (names[1:-1] < 0).all()
    assert len(set(names[1:-1].tolist())) == 1
    np.testing.assert_array_equal(names, prompt_cache_keys(tokens, [one], "", vision))
    for changed in (
        prompt_cache_keys(tokens, [other], "", vision),
        prompt_cache_keys(tokens, [one], "sha256:c", vision),
    ):
        assert (changed[1:-1] != names[1:-1]).all()
    assert prompt_cache_keys(tokens, [], "", vision).tolist() == tokens


def test_an_image_adapter_alone_leaves_rows_without_images_to_the_plain_base(
    opened: Deployment, expected: list[list[int]]
) -> None:
    made = dict(zip([(prompt, task) for prompt, _, task in ROWS], expected, strict=True))
    assert made["no picture", "looks"] == made["no picture", None]
    (row,) = opened.generate(["no picture"], tasks="looks", max_new_tokens=NEW)
    assert list(row.token_ids) == made["no picture", None]


def test_a_float16_base_takes_images(tmp_path: Path, opened: Deployment) -> None:
    half = build_seeing(tmp_path, dtype="float16")
    ids = half.inputs(opened.tokenizer.encode("ab@cd"), [A])["input_ids"].numpy()
    with Deployment.open(half.folder) as deployment:
        for task in (None, "both"):
            received = deployment.input_embeddings(ids, images=[[A]], tasks=task)
            wide = opened.input_embeddings(ids, images=[[A]], tasks=task)
            assert received.dtype == np.float16
            np.testing.assert_allclose(received.astype(np.float32), wide, rtol=2e-3, atol=2e-3)
        assert deployment.generate(["@?"], images=[[A]], tasks="both", max_new_tokens=2)[0].token_ids


def test_bfloat16_bits_are_those_of_pytorch() -> None:
    values = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    values[0, :4] = (1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0, 3e38)  # ties go to the even neighbour
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(as_stored(values, "bfloat16"), expected)


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        (["no"], [[A]], r"prompt 0 has 0 placeholders \(token 36\) and 1 images: write one placeholder for each image"),
        (["@@"], [[A]], "prompt 0 has 2 placeholders"),
        (["@"], None, "prompt 0 has 1 placeholders .* and 0 images"),
        (["a", "@"], [None, None], "prompt 1 has 1 placeholders .* and 0 images"),
        (["@"], [[A, B]], "prompt 0 has 1 placeholders .* and 2 images"),
        (["@"], [], "images is a list of 0 and there are 1 rows: expected a list with one entry for each row"),
        (["@"], [[A], [B]], "images is a list of 2 and there are 1 rows"),
        (["@"], "cat.png", "images is a str and there are 1 rows"),
        (["@"], A, "images is a Image and there are 1 rows"),
        (["@"], ["cat.png"], r"images\[0\] is a str, expected a list of images or None"),
        (["@"], [A], r"images\[0\] is a Image, expected a list of images or None"),
        (["a", "@@"], [None, [A, b"rubbish"]], r"images\[1\]\[1\] is not an image that Pillow can read"),
        (["@" + "a" * 60], [[A]], "the sequence would have"),
    ],
)
def test_a_request_that_cannot_be_answered(opened: Deployment, prompts: Any, images: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        opened.generate(prompts, images=images, max_new_tokens=2)


def test_run_wants_every_placeholder(opened: Deployment) -> None:
    with pytest.raises(RequestError, match=r"row 1 has 1 placeholders .* and 1 images: expected 9 placeholders"):
        opened.run(input_ids=[[5, 6], [IMAGE_TOKEN, 6]], images=[None, [A]])
    embeds = np.zeros((1, 9, opened.manifest.base.hidden_size), np.float32)
    with pytest.raises(RequestError, match="images go with input_ids"):
        opened.run(inputs_embeds=embeds, images=[[A]])
    with pytest.raises(RequestError, match="images go with input_ids"):
        opened.run(input_ids=[[IMAGE_TOKEN] * 9], images=[[A]], modality=[[0] * 9])


def test_without_images_placeholders_are_tokens_like_any_other(seeing: Seeing, opened: Deployment) -> None:
    ids = np.array([[5, IMAGE_TOKEN, 7]])
    with seeing.adapted(seeing.model, "both") as model, torch.no_grad():
        reference = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(opened.run(input_ids=ids, tasks="both")["logits"], reference, atol=1e-3)


def test_a_base_of_text_alone_takes_no_images(llama: Any) -> None:
    with Deployment.open(llama.folder) as deployment:
        assert deployment.generate(["a"], images=[None], max_new_tokens=1)
        with pytest.raises(RequestError, match="was exported without a vision tower and takes no images"):
            deployment.generate(["a"], images=[[A]])


def test_a_negative_budget_is_refused(seeing: Seeing) -> None:
    with pytest.raises(RequestError, match="image_cache_bytes is -1, expected at least 0"):
        Deployment.open(seeing.folder, image_cache_bytes=-1)


def test_a_closed_deployment_encodes_nothing(seeing: Seeing) -> None:
    deployment = Deployment.open(seeing.folder)
    deployment.close()
    with pytest.raises(RequestError, match="the deployment is closed: open it again"):
        deployment.generate(["@"], images=[[A]], max_new_tokens=2)


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", "preprocessor.json"])
def test_an_altered_vision_file_is_not_used(file: str, tmp_path: Path) -> None:
    own = build_seeing(tmp_path)
    path = own.folder / "base" / "vision" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with Deployment.open(own.folder) as deployment:
        assert deployment.generate(["text alone is answered"], max_new_tokens=1)
        assert not deployment.receipt().unchanged
        with pytest.raises(IntegrityError, match=f"base/vision/{file} has digest"):
            deployment.generate(["@"], images=[[A]], max_new_tokens=2)


def test_the_receipt_covers_the_vision_tower(opened: Deployment) -> None:
    receipt = opened.receipt()
    assert receipt.unchanged
    assert receipt.engine_builds == receipt.expected_builds == 1
    assert set(opened.manifest.base.vision.all_files) <= receipt.digests.keys()


def test_looking_at_images_loads_no_framework_and_text_alone_no_pillow(seeing: Seeing) -> None:
    code = (
        "import sys, io\n"
        "from adalink.runtime import Deployment\n"
        f"with Deployment.open({str(seeing.folder)!r}) as d:\n"
        "    d.generate(['abc'], tasks='both', max_new_tokens=3)\n"
        "    assert 'PIL' not in sys.modules\n"
        "    from PIL import Image\n"
        "    d.generate(['@'], images=[[Image.new('L', (30, 20))]], tasks='both', max_new_tokens=3)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxscript', 'optimum', 'peft', 'torchvision'}\n"
        "assert not heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
