"""Further variants of a base: what they share, and when they are those of another base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from helpers.tiny_models import FAMILIES, MAX_POSITIONS
from helpers.tiny_tokenizer import CHAT_TEMPLATE, make_tokenizer

from adalink.export.base.export import export_base
from adalink.runtime.errors import ContractError, DeploymentError, IntegrityError
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.training.models.loading import base_fingerprint


def test_variants_share_the_common_files(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    first = export_base(model, tmp_path, target="portable", tokenizer=make_tokenizer())
    table = tmp_path / first.base.embeddings
    before = table.stat()
    manifest = export_base(model, tmp_path, target="onnxruntime-cpu", tokenizer=make_tokenizer())
    assert manifest.variants.keys() == {"portable", "onnxruntime-cpu"}
    assert (table.stat().st_ino, table.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    graph = onnx.load(tmp_path / manifest.variants["onnxruntime-cpu"].graph)
    assert {node.domain for node in graph.graph.node} != {""}, "fused"
    verify_files(tmp_path, manifest)


def test_existing_variant_needs_replace(tmp_path: Path) -> None:
    model = FAMILIES["bert"]()
    first = export_base(model, tmp_path)
    with pytest.raises(DeploymentError, match=r"already has a base variant 'onnxruntime-cpu': pass --replace"):
        export_base(model, tmp_path)
    assert read_manifest(tmp_path) == first
    second = export_base(model, tmp_path, replace=True)
    assert second.variants["onnxruntime-cpu"].graph == "base/onnxruntime-cpu.2/model.onnx"
    assert not (tmp_path / "base" / "onnxruntime-cpu").exists()
    verify_files(tmp_path, second)


def test_other_base_or_dtype_is_refused_and_named(tmp_path: Path) -> None:
    first = export_base(FAMILIES["llama"](), tmp_path)
    other = FAMILIES["qwen2"]()
    with pytest.raises(ContractError) as caught:
        export_base(other, tmp_path, target="portable")
    assert first.base.fingerprint in str(caught.value)
    assert base_fingerprint(other) in str(caught.value)
    finetuned = FAMILIES["llama"]()
    with torch.no_grad():
        finetuned.model.layers[-1].mlp.down_proj.weight[3, 4] += 1e-3
    with pytest.raises(ContractError, match=r"weights_digest sha256:\w{64}, but .* has weights_digest sha256:\w{64}"):
        export_base(finetuned, tmp_path, target="portable")
    shorter = FAMILIES["llama"]()
    shorter.config.max_position_embeddings //= 2
    with pytest.raises(ContractError, match=rf"max_positions {MAX_POSITIONS}, but .* has max_positions"):
        export_base(shorter, tmp_path, target="portable")
    with pytest.raises(ContractError, match=r"embedding_dtype float32, but .* float16"):
        export_base(FAMILIES["llama"](), tmp_path, target="portable", dtype="float16")
    assert read_manifest(tmp_path) == first


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("tokenizer", lambda model, tokenizer: tokenizer.backend_tokenizer.add_special_tokens(["<new>"])),
        ("chat_template", lambda model, tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}")),
        ("chat_template", lambda model, tokenizer: setattr(tokenizer, "chat_template", None)),
        ("eos_token_ids and special_tokens", lambda model, tokenizer: setattr(tokenizer, "eos_token", "a")),
        ("special_tokens", lambda model, tokenizer: setattr(tokenizer, "sep_token", "<eos>")),
        ("eos_token_ids", lambda model, tokenizer: setattr(model.generation_config, "eos_token_id", [2, 5])),
        ("bos_token_id", lambda model, tokenizer: setattr(model.generation_config, "bos_token_id", 3)),
    ],
)
def test_a_variant_with_other_common_files_is_refused_and_named(field: str, change: Any, tmp_path: Path) -> None:
    first = export_base(FAMILIES["llama"](), tmp_path, tokenizer=make_tokenizer())
    model, tokenizer = FAMILIES["llama"](), make_tokenizer()
    change(model, tokenizer)
    for options in ({"replace": True}, {"target": "portable"}):
        with pytest.raises(ContractError, match=rf"with another {field} than .* export into another folder"):
            export_base(model, tmp_path, tokenizer=tokenizer, **options)
    assert read_manifest(tmp_path) == first


def test_a_variant_without_a_tokenizer_keeps_the_one_that_is_there(tmp_path: Path) -> None:
    model, tokenizer = FAMILIES["qwen2"](), make_tokenizer()
    model.generation_config.eos_token_id = model.config.eos_token_id = 1
    first = export_base(model, tmp_path / "one", tokenizer=tokenizer)
    assert first.base.eos_token_ids == (1, 2)
    assert export_base(model, tmp_path / "one", target="portable").base == first.base
    tokenizer.backend_tokenizer.enable_padding(length=9)  # its user's, and no part of what is written
    assert export_base(model, tmp_path / "one", tokenizer=tokenizer, replace=True).base == first.base
    bare = export_base(model, tmp_path / "two")
    with pytest.raises(ContractError, match="with another eos_token_ids and tokenizer and chat_template than"):
        export_base(model, tmp_path / "two", tokenizer=tokenizer, replace=True)
    assert read_manifest(tmp_path / "two") == bare


def test_a_chat_template_with_line_ends_of_windows_is_still_the_same(tmp_path: Path) -> None:
    model, tokenizer = FAMILIES["llama"](), make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE + "\r\n"
    first = export_base(model, tmp_path, tokenizer=tokenizer)
    assert export_base(model, tmp_path, target="portable", tokenizer=tokenizer).base == first.base


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("data", [None, b"", b"{\xff"], ids=["missing", "empty", "altered"])
def test_a_variant_beside_damaged_common_files_is_refused(name: str, data: bytes | None, tmp_path: Path) -> None:
    first, path = export_base(FAMILIES["llama"](), tmp_path, tokenizer=make_tokenizer()), tmp_path / "base" / name
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        export_base(FAMILIES["llama"](), tmp_path, target="portable", tokenizer=make_tokenizer())
    assert read_manifest(tmp_path) == first
