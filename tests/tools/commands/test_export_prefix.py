"""``adalink export prefix``: what it says, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main


def adalink(*words: Any) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


def test_a_text_becomes_a_task_that_answers(chat_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "deployment")
    (tmp_path / "manual.txt").write_text("oil rose.\n", encoding="utf-8-sig")
    words = ("export", "prefix", folder, "--text", tmp_path / "manual.txt", "--name", "manual")
    made = adalink(*words)
    assert made.exit_code == 0, made.stderr
    assert "KV prefix of 10 tokens, 0.0 MB" in made.stdout
    assert f"next: adalink run {folder}" in made.stderr
    again = adalink(*words)
    assert again.exit_code == 2
    assert "--replace" in again.stderr
    result = json.loads(adalink(*words, "--replace", "--dtype", "fp16", "--json").stdout)
    task = read_manifest(folder).tasks["manual"]
    assert task.kv_prefix is not None
    assert (result["tokens"], result["dtype"]) == (10, "float16")
    assert result["variant_digest"] == task.kv_prefix.variant_digest
    answer = adalink("run", folder, "why?", "--task", "manual", "--max-new-tokens", "3", "--threads", "1")
    assert answer.exit_code == 0, answer.stderr


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("none.txt", "latin.txt"):
        refused = adalink("export", "prefix", tmp_path, "--text", tmp_path / name, "--name", "manual")
        assert refused.exit_code == 2
        assert f"{name}: cannot be read as UTF-8 text" in refused.stderr
