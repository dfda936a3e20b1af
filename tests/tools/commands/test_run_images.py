"""`adalink export`, `inspect`, `run` and `eval` on models that take images."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from helpers.tiny_models import IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS, TILE_TOKENS
from helpers.vision_deployments import VisionDeployment, build_vision_deployment, picture
from helpers.vision_families import FAMILIES

from adalink.runtime import Deployment
from adalink.tools.cli import main


@pytest.fixture(scope="module")
def vision_deployment(tmp_path_factory) -> VisionDeployment:
    return build_vision_deployment(tmp_path_factory.mktemp("vision_deployment"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, seed in (("a.png", 1), ("b.png", 2)):
        picture(seed).save(folder / name)
    return folder


def invoke(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def output(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_images_go_to_their_placeholders(vision_deployment, files):
    options = ["--max-new-tokens", 6, "--task", "both"]
    with Deployment.open(vision_deployment.folder) as deployment:
        expected = {
            order: deployment.generate(
                ["@ or @"], images=[[picture(seed) for seed in order]], tasks="both", max_new_tokens=6
            )[0]
            for order in ((1, 2), (2, 1))
        }
    assert expected[1, 2].token_ids != expected[2, 1].token_ids
    for order in expected:
        images = [part for seed in order for part in ("--image", files / f"{' ab'[seed]}.png")]
        result = invoke("run", vision_deployment.folder, "@ or @", *images, *options)
        assert result.stdout == expected[order].text + "\n"
        answer = json.loads(invoke("run", vision_deployment.folder, "@ or @", *images, *options, "--json").stdout)
        assert answer["images"] == [str(part) for part in images[1::2]]


def test_rows_name_images_beside_the_file(vision_deployment, files):
    rows = [{"prompt": "@!", "images": ["b.png"], "task": "looks"}, {"prompt": "none"}]
    (files / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = invoke("run", vision_deployment.folder, "--jsonl", files / "rows.jsonl", "--max-new-tokens", 6)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    with Deployment.open(vision_deployment.folder) as deployment:
        expected = deployment.generate(
            ["@!", "none"], images=[[picture(2)], None], tasks=["looks", None], max_new_tokens=6
        )
    assert [answer["text"] for answer in answers] == [row.text for row in expected]
    assert "images" not in answers[1]


def test_eval_asks_with_the_images_of_a_row(vision_deployment, files):
    """Answers are those of PyTorch for each row alone; of a row with another one's image they would be others."""
    asked = [("@!", (1,)), ("@!", (2,)), ("@ or @", (1, 2)), ("@ or @", (2, 1))]
    rows = [
        {"prompt": prompt, "completion": "abcd", "images": [f"{' ab'[seed]}.png" for seed in seeds]}
        for prompt, seeds in asked
    ]
    (files / "right.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = files / "report.json"
    output("eval", vision_deployment.folder, "--data", files / "right.jsonl", "--task", "both", "--json-file", report)
    (task,) = json.loads(report.read_text())["tasks"]
    tokenizer = FAMILIES["llava"].make_tokenizer()
    limit = 1 + len(tokenizer("abcd", add_special_tokens=False)["input_ids"])
    replies = [
        tokenizer.decode(
            vision_deployment.greedy(prompt, [picture(seed) for seed in seeds], "both", limit), skip_special_tokens=True
        ).strip()
        for prompt, seeds in asked
    ]
    assert replies[0] != replies[1]
    assert replies[2] != replies[3]
    assert (task["kind"], task["rows"], task["accuracy"]["value"]) == ("text", 4, 0.0)
    assert {row["line"]: row["answer"] for row in task["wrong"]} == dict(enumerate(replies, start=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["@"], "prompt 0 has 1 placeholders (token 36) and 0 images"),
        (["no", "--image", "a.png"], "prompt 0 has 0 placeholders (token 36) and 1 images"),
        (["@", "--image", "missing.png"], "missing.png) cannot be read"),
        (["@", "--image", "rows.txt"], "rows.txt) is not an image that Pillow can read"),
        (["--jsonl", "rows.txt", "--image", "a.png"], "--image is for one prompt"),
        (["--jsonl", "rows.txt"], "rows.txt:1: images is b.png, expected a list of paths"),
    ],
)
def test_user_errors_end_with_their_message_and_exit_code_2(vision_deployment, files, monkeypatch, arguments, message):
    (files / "rows.txt").write_text('{"prompt": "@", "images": "b.png"}\n')
    monkeypatch.chdir(files)
    result = invoke("run", vision_deployment.folder, *arguments, "--max-new-tokens", 2)
    assert result.exit_code == 2
    assert message in result.stderr


def test_export_and_inspect_show_the_image_side(tmp_path):
    model = tmp_path / "model"
    FAMILIES["llava"].save(model)
    out = tmp_path / "deployment"
    exported = output("export", "base", model, "--out", out)
    assert "base/vision/model.onnx" in exported
    assert f"gives {IMAGE_TOKENS} positions an image" in exported
    found = json.loads(invoke("inspect", out, "--json").stdout)
    vision = found["vision"]
    assert vision["image_size"] == [IMAGE_SIZE, IMAGE_SIZE]
    assert (vision["image_token_id"], vision["tokens_per_image"]) == (IMAGE_TOKEN, IMAGE_TOKENS)
    assert vision["preprocessor"]["crop"] == [IMAGE_SIZE, IMAGE_SIZE]
    assert vision["size_bytes"] == sum((out / "base" / "vision" / name).stat().st_size for name in _GRAPH)
    graph = json.loads(invoke("inspect", out / "base" / "vision" / "model.onnx", "--json").stdout)
    assert graph["role"] == "vision graph"
    assert graph["outputs"] == {"image_embeds": "float (images, tokens, 48)"}
    described = json.loads(invoke("inspect", model, "--json").stdout)
    assert (described["class"], described["architecture"]) == ("LlavaForConditionalGeneration", "llava")
    assert described["fingerprint"] == found["base"]["fingerprint"]


_GRAPH = ("model.onnx", "model.onnx.data")


def test_checkpoint_of_tiles_is_exported_inspected_and_run(tmp_path):
    model, out, image = tmp_path / "model", tmp_path / "deployment", tmp_path / "a.png"
    FAMILIES["smolvlm"].save(model)
    picture(1).save(image)
    assert f"gives {TILE_TOKENS} positions a tile of an image" in output("export", "base", model, "--out", out)
    vision = json.loads(output("inspect", out, "--json"))["vision"]
    assert vision["takes_tiles"]
    assert vision["preprocessor"]["tiling"] == {"longest_edge": 48, "edge": 16, "is_cut": True}
    assert "longest_edge" in output("inspect", out)
    with Deployment.open(out) as deployment:
        (expected,) = deployment.generate(["<image>?"], images=[[picture(1)]], max_new_tokens=6)
    assert output("run", out, "<image>?", "--image", image, "--max-new-tokens", 6) == expected.text + "\n"
