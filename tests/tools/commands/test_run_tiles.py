"""`adalink export`, `inspect` and `run` on a model that cuts images into tiles."""

from __future__ import annotations

import json

from click.testing import CliRunner
from helpers.tiny_models import TILE_TOKENS, smolvlm
from helpers.tiny_tokenizer import make_tile_tokenizer
from helpers.vision import tile_processor
from helpers.vision_deployments import picture

from adalink.runtime import Deployment
from adalink.tools.cli import main


def invoke(*arguments):
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_from_a_checkpoint_to_an_answer(tmp_path):
    model, out, image = tmp_path / "model", tmp_path / "deployment", tmp_path / "a.png"
    for part in (smolvlm(), make_tile_tokenizer(), tile_processor()):
        part.save_pretrained(model)
    picture(1).save(image)
    assert f"gives {TILE_TOKENS} positions a tile of an image" in invoke("export", "base", model, "--out", out)
    vision = json.loads(invoke("inspect", out, "--json"))["vision"]
    assert vision["takes_tiles"]
    assert vision["preprocessor"]["tiling"] == {"longest_edge": 48, "edge": 16, "is_cut": True}
    assert "longest_edge" in invoke("inspect", out)
    with Deployment.open(out) as deployment:
        (expected,) = deployment.generate(["<image>?"], images=[[picture(1)]], max_new_tokens=6)
    assert invoke("run", out, "<image>?", "--image", image, "--max-new-tokens", 6) == expected.text + "\n"
