"""What a base leaves out of its checkpoint, from the shell's side; checkpoints that are refused end with code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers.tiny_models import FAMILIES
from safetensors.torch import load_file, save_file

from adalink.tools.cli import main

NAMES = ["classifier.bias", "classifier.weight", "pooler.dense.bias", "pooler.dense.weight"]


def adalink(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertForSequenceClassification

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-bert"
    BertForSequenceClassification(FAMILIES["bert"]().config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("bert."): value for name, value in tensors.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_export_and_inspect_name_what_is_left_out(classifier: Path, tmp_path: Path) -> None:
    out = tmp_path / "deployment"
    made = adalink("export", "base", classifier, "--out", out, "--target", "portable", "--json")
    assert made.exit_code == 0, made.output
    assert f"left out, since no output of the base depends on it: {', '.join(NAMES)}" in made.stderr
    assert json.loads(made.stdout)["unused_tensors"] == NAMES
    assert json.loads((out / "manifest.json").read_text())["base"]["unused_tensors"] == NAMES
    assert json.loads(adalink("inspect", out, "--json").stdout)["base"]["unused_tensors"] == NAMES
    shown = adalink("inspect", out).stdout
    assert "unused_tensors" in shown
    assert "classifier.weight" in shown
    assert json.loads(adalink("inspect", classifier, "--json").stdout)["unused_tensors"] == NAMES


@pytest.mark.parametrize("verb", ["export", "inspect"])
def test_a_checkpoint_that_would_lose_weights_ends_with_code_2(tmp_path: Path, verb: str) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path / "tiny")
    path = tmp_path / "tiny" / "model.safetensors"
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    save_file(load_file(path) | {name: load_file(path)["model.norm.weight"]}, path)
    further = ("base", tmp_path / "tiny", "--out", tmp_path / "out") if verb == "export" else (tmp_path / "tiny",)
    failed = adalink(verb, *further)
    assert failed.exit_code == 2
    assert name in failed.stderr
    assert "quantised" in failed.stderr
    assert not (tmp_path / "out").exists()
