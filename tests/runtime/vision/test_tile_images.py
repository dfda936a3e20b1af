"""Images cut into tiles, end to end: as PyTorch and transformers' own processor answer, whatever is in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runtime import reseal
from helpers.tiny_models import TILE_EDGE, TILE_IMAGE_TOKEN, TILE_TOKENS, idefics3, smolvlm
from helpers.tiny_tokenizer import make_tile_tokenizer
from helpers.vision import tile_processor
from helpers.vision_deployments import SeeingTiles, build_seeing_tiles, picture

from adalink.export.base.export import export_base
from adalink.runtime import Deployment
from adalink.runtime.errors import IntegrityError, RequestError
from adalink.runtime.ort.vision import OnnxVisionGraph
from adalink.runtime.storage import manifest

NEW = 8
# Of nine tiles and one more, of six, of three and of four.
A, B, C, D = (picture(seed, *size) for seed, size in enumerate(((30, 41), (50, 24), (7, 100), (48, 30)), start=1))
PROMPTS: list[tuple[str, list[Any]]] = [
    ("<image>what?", [A]),
    ("a <image> b\n\n<image>", [B, C]),
    ("no picture", []),
    ("<image>", [D]),
]
ROWS = [(prompt, images, task) for prompt, images in PROMPTS for task in (None, "words", "looks", "both", "asked")]


@pytest.fixture(scope="module", params=[idefics3, smolvlm], ids=["idefics3", "smolvlm"])
def tiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SeeingTiles:
    return build_seeing_tiles(tmp_path_factory.mktemp("tiled"), request.param())


@pytest.fixture(scope="module")
def opened(tiled: SeeingTiles) -> Any:
    with Deployment.open(tiled.folder) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def expected(tiled: SeeingTiles) -> list[list[int]]:
    return [tiled.greedy(prompt, images, task, NEW) for prompt, images, task in ROWS]


def test_rows_of_all_kinds_in_one_batch_are_what_pytorch_generates(
    tiled: SeeingTiles, opened: Deployment, expected: list[list[int]]
) -> None:
    prompts, images, tasks = zip(*ROWS, strict=True)
    found = opened.generate(prompts, images=images, tasks=tasks, max_new_tokens=NEW)
    assert [list(row.token_ids) for row in found] == expected
    lengths = [tiled.inputs(prompt, own)["input_ids"].shape[1] for prompt, own, _ in ROWS]
    assert [row.prompt_tokens for row in found] == lengths
    assert len(set(lengths)) == len(PROMPTS)


def test_prompts_by_their_token_ids_expanded_or_not(
    tiled: SeeingTiles, opened: Deployment, expected: list[list[int]]
) -> None:
    for (prompt, images, task), made in zip(ROWS, expected, strict=True):
        for tokens in (opened.tokenizer.encode(prompt), tiled.inputs(prompt, images)["input_ids"][0].tolist()):
            (row,) = opened.generate([tokens], images=[images or None], tasks=task, max_new_tokens=NEW)
            assert list(row.token_ids) == made


def test_logits_are_pytorchs(tiled: SeeingTiles, opened: Deployment) -> None:
    for prompt, images, task in ROWS:
        plain, limit = tiled.logits(prompt, images, task)
        ids = tiled.inputs(prompt, images)["input_ids"].numpy()
        received = opened.run(input_ids=ids, images=[images], tasks=task)["logits"][0]
        assert np.abs(received - plain).max() <= limit, (prompt, task)
        assert limit < 1e-2
        if len(images) == 1:  # the limit finds another picture of as many tiles, and another task
            other = np.asarray(images[0])[::-1]
            far = opened.run(input_ids=ids, images=[[other]], tasks=task)["logits"][0]
            assert np.abs(far - plain).max() > 10 * limit


def test_the_limit_finds_tiles_in_another_order(tiled: SeeingTiles, opened: Deployment) -> None:
    inputs = tiled.inputs("<image>", [A])
    received = opened.run(input_ids=inputs["input_ids"].numpy(), images=[[A]])["logits"][0]
    for order in ([9, *range(9)], [0, 3, 6, 1, 4, 7, 2, 5, 8, 9]):
        with torch.no_grad():
            wrong = tiled.model(**inputs | {"pixel_values": inputs["pixel_values"][:, order]}).logits[0].numpy()
        assert np.abs(received - wrong).max() > 10 * tiled.logits("<image>", [A], None)[1]


def test_the_encoder_runs_once_for_a_picture_and_the_cache_keeps_to_its_budget(tiled: SeeingTiles) -> None:
    with Deployment.open(tiled.folder) as deployment:
        for task in (None, "words", "looks"):
            deployment.generate(["<image><image>"], images=[[A, np.asarray(A)]], tasks=task, max_new_tokens=1)
        assert deployment.images_encoded == 1
        deployment.generate(["<image>"] * 2, images=[[B], [A]], max_new_tokens=1)
        assert deployment.images_encoded == 2
    tile = TILE_TOKENS * tiled.model.config.text_config.hidden_size * 4
    with Deployment.open(tiled.folder, image_cache_bytes=9 * tile) as deployment:
        for image, encoded in ((B, 1), (B, 1), (A, 2), (A, 3), (B, 3)):  # seven tiles fit, ten do not
            deployment.generate(["<image>"], images=[[image]], max_new_tokens=1)
            assert deployment.images_encoded == encoded


def test_the_tower_takes_few_tiles_at_a_time(
    tiled: SeeingTiles, opened: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tiled.inputs("<image><image>", [B, A])["input_ids"].numpy()
    expected = opened.input_embeddings(ids, images=[[B, A]])
    monkeypatch.setattr(manifest, "_PIXELS_AT_ONCE", 3 * TILE_EDGE**2)
    calls: list[int] = []
    run = OnnxVisionGraph.run
    monkeypatch.setattr(OnnxVisionGraph, "run", lambda self, tiles: calls.append(len(tiles)) or run(self, tiles))
    with Deployment.open(tiled.folder) as deployment:
        np.testing.assert_allclose(deployment.input_embeddings(ids, images=[[B, A]]), expected, atol=1e-5)
    assert calls == [3, 3, 3, 3, 3, 2]


def test_kept_prefixes_are_those_of_one_picture_under_one_adapter(
    tiled: SeeingTiles, expected: list[list[int]]
) -> None:
    with Deployment.open(tiled.folder, prefix_cache_bytes=1 << 20) as deployment:
        for _ in range(2):
            for (prompt, images, task), made in zip(ROWS, expected, strict=True):
                (row,) = deployment.generate([prompt], images=[images], tasks=task, max_new_tokens=NEW)
                assert list(row.token_ids) == made
        for image in (A, B, np.asarray(A)[::-1]):  # one prompt, other pictures
            (row,) = deployment.generate(["<image>what?"], images=[[image]], tasks="looks", max_new_tokens=NEW)
            assert list(row.token_ids) == tiled.greedy("<image>what?", [image], "looks", NEW)


def test_an_all_zero_tile_is_a_tile(tmp_path: Path) -> None:
    """Where values are not normalised black is zero, which the model's own code takes for padding, and fails."""
    model = smolvlm()
    processor = tile_processor(do_normalize=False)
    export_base(model, tmp_path, tokenizer=make_tile_tokenizer(), image_processor=processor)
    black = np.zeros((48, 48, 3), np.uint8)
    black[:16, :16] = 255
    with Deployment.open(tmp_path) as deployment:
        (written,) = [row.prompt_tokens for row in deployment.generate(["<image>"], images=[[black]], max_new_tokens=1)]
        assert written == 10 * TILE_TOKENS + 9 * 2 + 2 + 1 + 2 + 1
        ids = [[TILE_IMAGE_TOKEN] * 10 * TILE_TOKENS]
        received = deployment.input_embeddings(ids, images=[[black]])[0].reshape(10, TILE_TOKENS, -1)
    with torch.no_grad():
        states = model.model.vision_model(torch.zeros(1, 3, TILE_EDGE, TILE_EDGE)).last_hidden_state
        expected = model.model.connector(states)[0].numpy()
    for tile in received[1:9]:
        np.testing.assert_allclose(tile, expected, atol=1e-4)
    assert np.abs(received[0] - expected).max() > 0.1


# As SmolVLM's: a plain text is a list of characters to it, none of which has a type.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def test_a_chat_template_for_texts_and_images(tmp_path: Path) -> None:
    model, tokenizer = idefics3(), make_tile_tokenizer()
    tokenizer.chat_template = TEMPLATE
    export_base(model, tmp_path, tokenizer=tokenizer, image_processor=tile_processor())
    image, text = {"type": "image"}, {"type": "text"}
    chats = {
        "What is it?": [text | {"text": "What is it?"}],
        "<image>What<image> is it?": [image, text | {"text": "What"}, image, text | {"text": " is it?"}],
        "Is it <image>": [text | {"text": "Is it "}, image],
        # All of these are in what the template writes around a message.
        **{word: [text | {"text": word}] for word in ("A", "is", "User", ":")},
    }
    with Deployment.open(tmp_path) as deployment:
        for message, content in chats.items():
            chat = [{"role": "user", "content": content}]
            expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            assert deployment.tokenizer.render_chat(message) == expected
            images = [[A, B][: message.count("<image>")]]
            (answer,) = deployment.generate([message], images=images, max_new_tokens=4, chat=True)
            (again,) = deployment.generate([expected], images=images, max_new_tokens=4)
            assert answer == again


def test_tiles_without_tokens_of_their_own_are_refused(tmp_path: Path) -> None:
    export_base(smolvlm(), tmp_path, tokenizer=make_tile_tokenizer(), image_processor=tile_processor())
    path = tmp_path / "base" / "vision" / "preprocessor.json"
    path.write_text(path.read_text().replace('"longest_edge": 48', '"longest_edge": 64'))
    reseal(tmp_path)
    message = r"cuts pictures into tiles of \(\(16, 16\), 4\), the manifest has tokens for \(\(16, 16\), 3\)"
    with Deployment.open(tmp_path) as deployment, pytest.raises(IntegrityError, match=message):
        deployment.generate(["<image>"], images=[[A]], max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        (["no"], [[A]], "prompt 0 has 0 placeholders .* and 1 images: write one .* or all 40 positions"),
        (["<image><image>"], [[A]], "prompt 0 has 2 placeholders .* and 1 images"),
        (["<image>"], None, "prompt 0 has 1 placeholders .* and 0 images"),
        (["<image>"], [[A, B]], "prompt 0 has 1 placeholders .* and 2 images: .* all 68 positions"),
        (["<image>"], [[b"rubbish"]], r"images\[0\]\[0\] is not an image that Pillow can read"),
        (["<image>" * 4], [[A] * 4], "the sequence would have .* positions, .* at most 256"),
        (["<image>"], [[np.zeros((4, 4, 3), np.float32)]], "is an array of float32, expected uint8"),
    ],
)
def test_a_request_that_cannot_be_answered(opened: Deployment, prompts: Any, images: Any, message: str) -> None:
    before = opened.images_encoded
    with pytest.raises(RequestError, match=message):
        opened.generate(prompts, images=images, max_new_tokens=2)
    assert opened.images_encoded == before, "the tower ran for nothing"


def test_run_wants_every_placeholder(opened: Deployment) -> None:
    with pytest.raises(RequestError, match=r"row 0 has 4 placeholders .* and 1 images: expected 40 placeholders, 4"):
        opened.run(input_ids=[[TILE_IMAGE_TOKEN] * 4], images=[[A]])
