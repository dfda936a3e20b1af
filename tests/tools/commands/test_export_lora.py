"""``adalink export lora``: what it says, and what it asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from helpers.loras import seeded_task
from helpers.runtime import write_adapter
from helpers.tiny_ggufs import write_gguf
from helpers.tiny_models import FAMILIES

from adalink.export.base.export import export_base
from adalink.tools.cli import main
from adalink.training.models.loading import base_fingerprint


def adalink(*words: Any) -> Result:
    return CliRunner().invoke(main, ["export", "lora", *map(str, words)])


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "topics", seeded_task(base_fingerprint(FAMILIES["llama"]())))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", FAMILIES["llama"](), "llama")


def test_a_gguf_base_gives_a_file_and_a_copy_to_run(task: Path, model: Path, tmp_path: Path) -> None:
    out, copy = tmp_path / "topics.gguf", tmp_path / "untied.gguf"
    words = (task, "--base", model, "--format", "gguf", "--out", out)
    refused = adalink(*words)
    assert refused.exit_code == 2
    assert "with --untied-base FILE" in refused.stderr
    shown = adalink(*words, "--untied-base", copy)
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.splitlines()[0] == f"{out} is a LoRA of the input embedding for tiny: rank 4, 0.0 MB"
    assert shown.stdout.splitlines()[-1] == f"  llama-server --model {copy} --lora {out}"
    again = adalink(task, "--base", copy, "--format", "gguf", "--out", out, "--replace", "--dtype", "fp16", "--json")
    made = json.loads(again.stdout)
    assert (made["rank"], made["alpha"], made["dtype"], made["tokens"]) == (4, 4.0, "float16", 96)
    assert made["size_bytes"] == out.stat().st_size


def test_a_deployment_gives_a_folder_for_peft(task: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    export_base(FAMILIES["llama"](), tmp_path / "deployment", target="portable")
    words = (task, "--deployment", tmp_path / "deployment", "--out", out)
    shown = adalink(*words, "--format", "peft")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == f'  PeftModel.from_pretrained(model, "{out}")'
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    noted = adalink(*words[:3], "--out", tmp_path / "lora.gguf", "--format", "gguf")
    assert noted.exit_code == 0
    assert "llama.cpp needs a GGUF file whose head has a matrix of its own" in noted.stderr
    for extra in (("--untied-base", tmp_path / "copy.gguf"), ("--base", "tiny")):
        wrong = adalink(*words, "--format", "gguf", "--replace", *extra)
        assert wrong.exit_code == 2


@pytest.mark.parametrize("words", [(), ("--base", "x", "--deployment", "y")])
def test_one_base_is_asked_for(words: tuple[str, ...], task: Path, tmp_path: Path) -> None:
    refused = adalink(task, "--format", "peft", "--out", tmp_path / "out", *words)
    assert refused.exit_code == 2
    assert "give one of --base and --deployment" in refused.stderr
