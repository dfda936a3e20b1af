"""The kind of a base by its config alone is the kind under which it is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.export import MODELS
from helpers.tiny_ggufs import write_gguf

from adalink.export.architectures import ARCHITECTURES
from adalink.training.models.base_kind import find_kind
from adalink.training.models.source import find_source


@pytest.mark.parametrize("family", MODELS)
def test_kind_is_that_of_the_export(family: str, tmp_path: Path) -> None:
    model = MODELS[family]()
    model.save_pretrained(tmp_path)
    assert find_kind(find_source(tmp_path)) == ARCHITECTURES[model.config.model_type].kind


@pytest.mark.parametrize(("family", "kind"), [("llama", "decoder"), ("t5", "encoder-decoder")])
def test_kind_of_a_gguf_file(family: str, kind: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", MODELS[family](), family)
    assert find_kind(find_source(tmp_path)) == kind


@pytest.mark.parametrize("config", ["{}", '{"architectures": []}', '{"architectures": 7}', "[1]", "no JSON"])
def test_a_config_that_says_nothing_is_left_to_the_loader(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").touch()
    assert find_kind(find_source(tmp_path)) is None


def test_a_class_with_a_head_that_is_not_loaded_is_an_encoder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for name, kind in (("BertForMaskedLM", "encoder"), ("LlamaModel", "encoder"), ("GPT2LMHeadModel", "decoder")):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
        assert find_kind(find_source(tmp_path)) == kind
