"""A further variant for a deployment of an older kit: its answers stay, and what it lacks is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.runtime import reseal
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_pair_tokenizer, make_tokenizer

from adalink.export.base.export import export_base
from adalink.export.base.older_base import name_missing, take_up
from adalink.runtime import Deployment
from adalink.runtime.errors import RequestError
from adalink.runtime.storage.digest import digest_bytes
from adalink.runtime.storage.tokenizer_digest import tokenizer_digest

# Fields that manifests of schema version 3 do not have.
NEW = ("generation", "token_types", "tokenizer_types", "special_tokens", "unused_tensors", "tokenizer_digest")


def make_older(folder: Path) -> None:
    """Rewrite a manifest as an older kit wrote it: version 3, without the new fields."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in NEW:
        manifest["base"].pop(name, None)
    blank = json.dumps(manifest | {"schema_version": 3, "digest": ""})
    path.write_text(blank.replace('"digest": ""', f'"digest": "{digest_bytes(blank.encode())}"'))


def test_decoder(tmp_path: Path) -> None:
    model: Any = FAMILIES["llama"]()
    export_base(model, tmp_path, tokenizer=make_tokenizer())
    make_older(tmp_path)
    with Deployment.open(tmp_path) as deployment:
        before = deployment.generate(["a text"], max_new_tokens=8, chat=True)
    model.generation_config.repetition_penalty = 3.0
    lines: list[str] = []
    manifest = export_base(model, tmp_path, tokenizer=make_tokenizer(), target="portable", progress=lines.append)
    assert [manifest.base.generation, manifest.base.special_tokens, manifest.base.token_types] == [None] * 3
    assert manifest.base.tokenizer is not None
    assert manifest.base.tokenizer_digest == tokenizer_digest((tmp_path / manifest.base.tokenizer).read_bytes())
    for fact in ("generation defaults", "special tokens: chat templates"):
        assert any(f"of an older kit without {fact}" in line for line in lines), lines
    assert not any("token types" in line for line in lines)
    for variant in ("onnxruntime-cpu", "portable"):
        with Deployment.open(tmp_path, variant=variant) as deployment:
            assert deployment.generate(["a text"], max_new_tokens=8, chat=True) == before


def test_what_changes_no_result_is_taken_up(tmp_path: Path) -> None:
    base = export_base(FAMILIES["llama"](), tmp_path, target="portable", tokenizer=make_tokenizer()).base
    described = msgspec.structs.replace(base, unused_tensors=("score.weight",))
    older = msgspec.structs.replace(base, tokenizer_digest="")
    assert take_up(older, described) == described
    unknown = msgspec.structs.replace(older, weights_digest="")
    assert take_up(unknown, described) == unknown


def test_encoder(tmp_path: Path) -> None:
    """The new variant has no token types either, since variants share a base."""
    model: Any = FAMILIES["bert"]()
    described = export_base(model, tmp_path, tokenizer=make_pair_tokenizer()).base
    reseal(tmp_path, base=msgspec.structs.replace(described, token_types=None, tokenizer_types=False))
    lines: list[str] = []
    export_base(model, tmp_path, tokenizer=make_pair_tokenizer(), target="portable", progress=lines.append)
    assert any("of an older kit without token types: it refuses pairs of texts" in line for line in lines)
    assert name_missing(described, described) == []
    with Deployment.open(tmp_path, variant="portable") as deployment:
        states = deployment.run(input_ids=[[2, 5, 6, 3]])["last_hidden_state"]
        assert states.shape == (1, 4, described.hidden_size)
        with pytest.raises(RequestError, match="token_type"):
            deployment.run(input_ids=[[2, 5, 3, 6, 3]], token_type_ids=[[0, 0, 0, 1, 1]])
