"""``--assume-pretokenizer`` of every verb that reads a GGUF file's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers import tiny_models
from helpers.tiny_ggufs import write_gguf

from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main
from adalink.training.adapter_io import digest_tokenizer
from adalink.training.models.loading import load_tokenizer


def adalink(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_models.llama(), "llama", pre="default")


def test_export_train_and_verify_assume_the_same(model: Path, tmp_path: Path) -> None:
    export = ("export", "base", model, "--out", tmp_path / "deployment")
    refused = adalink(*export)
    assert refused.exit_code == 2
    assert "tokenizer.ggml.pre = 'default'" in refused.output
    assert adalink(*export, "--assume-pretokenizer", "smollm").exit_code == 0
    digest = read_manifest(tmp_path / "deployment").base.tokenizer_digest
    assert digest == digest_tokenizer(load_tokenizer(model, assume_pretokenizer="smollm"))

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a {n}", "completion": " b"}) + "\n" for n in range(8)))
    train = ("train", "--base", model, "--data", rows, "--eval", rows, "--max-steps", 1, "--rank", 2, "--device", "cpu")
    assert adalink(*train, "--out", tmp_path / "a").exit_code == 2
    for name, assumed, code in (("same", "smollm", 0), ("other", "gpt-2", 2)):
        assert adalink(*train, "--out", tmp_path / name, "--assume-pretokenizer", assumed).exit_code == 0
        added = adalink("export", "adapter", tmp_path / name, "--out", tmp_path / "deployment")
        assert added.exit_code == code
        assert ("was trained with another tokenizer" in added.output) == bool(code)

    verify = ("verify", tmp_path / "deployment", "--against", model, "--quick")
    assert adalink(*verify).exit_code == 2
    assert adalink(*verify, "--assume-pretokenizer", "gpt-2").exit_code == 1
