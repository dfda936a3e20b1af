"""Requests with images that cannot be answered, files that are not what they were, and what is loaded to look."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runtime import reseal
from helpers.tiny_models import IMAGE_TOKEN, PREFIX_IMAGE_TOKEN, TILE_IMAGE_TOKEN
from helpers.vision_deployments import GRIDS, PATCH_DEPLOYMENTS, A, B, VisionCases, VisionDeployment, picture
from helpers.vision_families import FAMILIES, TILES

from adalink.export.base.export import export_base
from adalink.runtime import Deployment
from adalink.runtime.errors import BackendError, IntegrityError, RequestError
from adalink.runtime.storage.safetensors import as_stored
from adalink.runtime.storage.vision_schema import PatchTower

Refused = list[tuple[list[Any], Any, str]]
GRID = GRIDS[0]
LLAVA: Refused = [
    (["no"], [[A]], r"prompt 0 has 0 placeholders \(token 36\) and 1 images: write one placeholder for each image"),
    (["@@"], [[A]], "prompt 0 has 2 placeholders"),
    (["@" * 10], [[A]], "prompt 0 has 10 placeholders .* and 1 images: .* all 9 positions"),
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
]
TILE: Refused = [
    (["no"], [[A]], "prompt 0 has 0 placeholders .* and 1 images: write one .* or all 40 positions"),
    (["<image><image>"], [[A]], "prompt 0 has 2 placeholders .* and 1 images"),
    (["<image>"], None, "prompt 0 has 1 placeholders .* and 0 images"),
    (["<image>"], [[A, B]], "prompt 0 has 1 placeholders .* and 2 images: .* all 68 positions"),
    (["<image>"], [[b"rubbish"]], r"images\[0\]\[0\] is not an image that Pillow can read"),
    (["<image>" * 4], [[A] * 4], "the sequence would have .* positions, .* at most 256"),
    (["<image>"], [[np.zeros((4, 4, 3), np.float32)]], "is an array of float32, expected uint8"),
]
PREFIX: Refused = [
    (["<image>a"], None, r"prompt 0 has 1 placeholders \(token 98\) and 0 images"),
    (["<image><image>a"], [[A]], "prompt 0 has 2 placeholders .* and 1 images"),
    (["<image>a"], [[A, B]], "prompt 0 has 1 placeholders .* and 2 images"),
    ([[5, 6]], [[A]], "prompt 0 has 0 placeholders .* and 1 images"),
    (["a", "b"], [None, [A, b"rubbish"]], r"images\[1\]\[1\] is not an image that Pillow can read"),
    (["a" * 60], [[A]], "the sequence would have"),
    (["a"], "cat.png", "images is a str and there are 1 rows"),
]
PATCH: Refused = [
    (["no"], [[GRID]], "prompt 0 has 0 placeholders .* and 1 images: write one .* or all 15 positions"),
    (["@@"], [[GRID]], "prompt 0 has 2 placeholders .* and 1 images"),
    (["@"], None, "prompt 0 has 1 placeholders .* and 0 images"),
    (["@"], [[GRID, GRIDS[1]]], "prompt 0 has 1 placeholders .* and 2 images: .* all 31 positions"),
    (["@"], [[b"rubbish"]], r"images\[0\]\[0\] is not an image that Pillow can read"),
    (["@" * 18], [[GRID] * 18], "the sequence would have .* positions, .* at most 256"),
    (["@"], [[np.zeros((2, 500, 3), np.uint8)]], "the image is 500 x 2 pixels, expected the longer edge"),
    (["@" * 16], [[GRID]], "prompt 0 has 16 placeholders .* and 1 images: .* all 15 positions"),
    ([[IMAGE_TOKEN] * 7 + [5] + [IMAGE_TOKEN] * 8], [[GRID]], "row 0: the placeholders of image 0 do not stand"),
]
REFUSED = {
    "llava": LLAVA,
    **dict.fromkeys(TILES, TILE),
    "paligemma": PREFIX,
    **dict.fromkeys(PATCH_DEPLOYMENTS, PATCH),
}


@pytest.mark.parametrize(
    ("name", "prompts", "images", "message"), [(name, *row) for name, rows in REFUSED.items() for row in rows]
)
def test_request_that_cannot_be_answered_is_refused(
    vision_cases: VisionCases, name: str, prompts: Any, images: Any, message: str
) -> None:
    opened = vision_cases[name].opened
    before = opened.images_encoded
    with pytest.raises(RequestError, match=message):
        opened.generate(prompts, images=images, max_new_tokens=2)
    if name in TILES:
        assert opened.images_encoded == before, "the tower ran for nothing"


@pytest.mark.parametrize(
    ("name", "ids", "images", "given", "expected"),
    [
        ("llava", [[5, 6], [IMAGE_TOKEN, 6]], [None, [A]], "row 1 has 1", "9 placeholders"),
        *((name, [[TILE_IMAGE_TOKEN] * 4], [[A]], "row 0 has 4", "40 placeholders, 4") for name in TILES),
        ("paligemma", [[PREFIX_IMAGE_TOKEN, 6]], [[A]], "row 0 has 1", "9 placeholders"),
        ("llava", [[IMAGE_TOKEN] * 10], [[A]], "row 0 has 10", "9 placeholders"),
        *((name, [[TILE_IMAGE_TOKEN] * 41], [[A]], "row 0 has 41", "40 placeholders, 4") for name in TILES),
        ("paligemma", [[PREFIX_IMAGE_TOKEN] * 18], [[A]], "row 0 has 18", "9 placeholders"),
        *((name, [[IMAGE_TOKEN] * 16], [[GRID]], "row 0 has 16", "15 placeholders") for name in PATCH_DEPLOYMENTS),
        *((name, [[IMAGE_TOKEN] * 4], [[GRID]], "row 0 has 4", "15 placeholders, 1 for") for name in PATCH_DEPLOYMENTS),
    ],
)
def test_run_with_too_few_or_many_placeholders_is_refused(
    vision_cases: VisionCases, name: str, ids: Any, images: Any, given: str, expected: str
) -> None:
    with pytest.raises(RequestError, match=f"{given} placeholders .* and 1 images: expected {expected}"):
        vision_cases[name].opened.run(input_ids=ids, images=images)


def test_images_beside_other_inputs_than_ids_are_refused(vision_cases: VisionCases) -> None:
    opened = vision_cases["llava"].opened
    embeds = np.zeros((1, 9, opened.manifest.base.hidden_size), np.float32)
    with pytest.raises(RequestError, match="images go with input_ids"):
        opened.run(inputs_embeds=embeds, images=[[A]])
    with pytest.raises(RequestError, match="images go with input_ids"):
        opened.run(input_ids=[[IMAGE_TOKEN] * 9], images=[[A]], modality=[[0] * 9])


@pytest.mark.parametrize("name", PATCH_DEPLOYMENTS)
@pytest.mark.parametrize("seen", [0, 7])
def test_image_that_is_masked_out_is_refused(vision_cases: VisionCases, name: str, seen: int) -> None:
    ids = [[5, *[IMAGE_TOKEN] * 15, 6]]
    mask = [[1, *[1] * seen, *[0] * (16 - seen)]]
    with pytest.raises(RequestError, match=r"row 0: the placeholders of image 0 do not .* none of them out by atten"):
        vision_cases[name].opened.run(input_ids=ids, attention_mask=mask, images=[[GRID]])


def test_base_of_text_alone_takes_no_images(llama: Any) -> None:
    with Deployment.open(llama.folder) as deployment:
        assert deployment.generate(["a"], images=[None], max_new_tokens=1)
        with pytest.raises(RequestError, match="was exported without a vision tower and takes no images"):
            deployment.generate(["a"], images=[[A]])


def test_closed_deployment_encodes_nothing(vision_deployment: VisionDeployment) -> None:
    deployment = Deployment.open(vision_deployment.folder)
    deployment.close()
    with pytest.raises(RequestError, match="the deployment is closed: open it again"):
        deployment.generate(["@"], images=[[A]], max_new_tokens=2)


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", "preprocessor.json"])
def test_altered_vision_file_is_not_used(vision_deployment: VisionDeployment, file: str, tmp_path: Path) -> None:
    folder = shutil.copytree(vision_deployment.folder, tmp_path / "deployment")
    path = folder / "base" / "vision" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with Deployment.open(folder) as deployment:
        assert deployment.generate(["text alone is answered"], max_new_tokens=1)
        assert not deployment.receipt().unchanged
        with pytest.raises(IntegrityError, match=f"base/vision/{file} has digest"):
            deployment.generate(["@"], images=[[A]], max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "smolvlm",
            '"longest_edge": 48',
            '"longest_edge": 64',
            r"cuts images into tiles of \(\(16, 16\), 4\), the manifest has tokens for \(\(16, 16\), 3\)",
        ),
        ("llava", '"resample": 3', '"resample": 99', "resample is 99, expected 0 to 5"),
        ("llava", '"crop": [\n    ', '"crop": [\n    1', "gives pictures of .*, the manifest says"),
        (
            "qwen2_5_vl",
            '"edge": 4',
            '"edge": 5',
            r"cuts images into patches by .*edge=5.*, the manifest expects \(\(8, 8\), 2\)",
        ),
    ],
)
def test_preprocessor_that_the_manifest_does_not_fit_is_refused(
    vision_cases: VisionCases, name: str, old: str, new: str, message: str, tmp_path: Path
) -> None:
    made = vision_cases[name].made
    folder = shutil.copytree(made.folder, tmp_path / "deployment")
    path = folder / "base" / "vision" / "preprocessor.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    reseal(folder)
    with Deployment.open(folder) as deployment, pytest.raises(IntegrityError, match=message):
        deployment.generate([made.family.placeholder], images=[[GRID]], max_new_tokens=1)


@pytest.mark.parametrize("name", PATCH_DEPLOYMENTS)
def test_tower_that_gets_wrong_patches_says_so(
    vision_cases: VisionCases, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = PatchTower.inputs
    monkeypatch.setattr(PatchTower, "inputs", lambda self, grid: inputs(self, (grid[0] + 1, grid[1])))
    with pytest.raises(BackendError, match=r"base/vision/model\.onnx"):
        vision_cases[name].opened.generate(["@"], images=[[picture(77, 25, 41)]], max_new_tokens=1)


# As SmolVLM's: a plain text is a list of characters to it, none of which has a type.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def test_chat_template_for_texts_and_images_is_rendered(tmp_path: Path) -> None:
    family = FAMILIES["idefics3"]
    tokenizer = family.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    export_base(family.make_model(), tmp_path, tokenizer=tokenizer, image_processor=family.make_processor())
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


def test_bfloat16_bits_are_those_of_pytorch() -> None:
    values = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    values[0, :4] = (1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0, 3e38)  # ties go to the even neighbour
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(as_stored(values, "bfloat16"), expected)


def test_receipt_covers_the_vision_tower(vision_deployment: VisionDeployment) -> None:
    with Deployment.open(vision_deployment.folder) as opened:
        opened.generate(["@"], images=[[A]], max_new_tokens=1)
        receipt = opened.receipt()
        assert receipt.unchanged
        assert receipt.engine_builds == receipt.expected_builds == 1
        assert set(opened.manifest.base.vision.all_files) <= receipt.digests.keys()


def test_images_load_no_framework_and_text_alone_no_pillow(vision_deployment: VisionDeployment) -> None:
    code = (
        "import sys, io\n"
        "from adalink.runtime import Deployment\n"
        f"with Deployment.open({str(vision_deployment.folder)!r}) as d:\n"
        "    d.generate(['abc'], tasks='both', max_new_tokens=3)\n"
        "    assert 'PIL' not in sys.modules\n"
        "    from PIL import Image\n"
        "    d.generate(['@'], images=[[Image.new('L', (30, 20))]], tasks='both', max_new_tokens=3)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxscript', 'optimum', 'peft', 'torchvision'}\n"
        "assert not heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
