"""The manifest: strict reading, with the path of the wrong field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from adalink.runtime.errors import DeploymentError, IntegrityError, ManifestError
from adalink.runtime.storage.adapter_spec import ACTIVATION_KEYS
from adalink.runtime.storage.integrity import locate
from adalink.runtime.storage.manifest import SCHEMA_VERSION, Manifest
from adalink.runtime.storage.manifest_io import decode_manifest, encode_manifest, read_manifest
from adalink.runtime.storage.manifest_validation import check_task_name

DIGEST = "sha256:" + "a1" * 32


def fields() -> dict[str, Any]:
    paths = [
        "base/embeddings.safetensors",
        "base/tokenizer.json",
        "base/portable/model.onnx",
        "tasks/r8/adapter.onnx",
        "tasks/r8/adapter_config.json",
        "tasks/r8/adapter_model.safetensors",
        *(f"base/bank/{kind}.onnx" for kind in ACTIVATION_KEYS),
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "kit_version": "0.1.0",
        "base": {
            "name": "tiny",
            "architecture": "llama",
            "kind": "decoder",
            "fingerprint": DIGEST,
            "vocab_size": 100,
            "hidden_size": 32,
            "embedding_dtype": "float32",
            "modalities": ["text"],
            "max_positions": 64,
            "cache": {"layers": 2, "kv_heads": 1, "head_dim": 16},
            "eos_token_ids": [2],
            "pad_token_id": 0,
            "embeddings": paths[0],
            "tokenizer": paths[1],
            "bank": {kind: f"base/bank/{kind}.onnx" for kind in ACTIVATION_KEYS},
        },
        "variants": {
            "portable": {
                "target": "portable",
                "backends": ["onnxruntime-cpu"],
                "graph": paths[2],
                "files": [paths[2]],
            }
        },
        "tasks": {
            "r8": {
                "graph": paths[3],
                "config": paths[4],
                "weights": paths[5],
                "adapter_digest": DIGEST,
                "rank": 4,
                "activation": "gelu",
                "modalities": ["text"],
                "scope": "all",
            }
        },
        "files": {path: {"sha256": DIGEST, "size_bytes": 10} for path in paths},
    }


def decode(value: dict[str, Any]) -> Any:
    return decode_manifest(json.dumps(value).encode())


def test_round_trip() -> None:
    manifest = msgspec.convert(fields(), Manifest)
    decoded = decode_manifest(encode_manifest(manifest))
    assert msgspec.structs.replace(decoded, digest="") == manifest
    assert manifest.paths_in_use() == set(fields()["files"])


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value

    return change


def _delete(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        for key in path[:-1]:
            tree = tree[key]
        del tree[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_delete("base"), "$.base"),
        (_delete("base", "hidden_size"), "$.base.hidden_size"),
        (_delete("schema_version"), "$.schema_version"),
        (_set("schema_version", value=SCHEMA_VERSION + 1), "$.schema_version"),
        (_set("base", "hidden_size", value="wide"), "$.base.hidden_size"),
        (_set("base", "hidden_size", value=0), "$.base.hidden_size"),
        (_set("base", "vocab_size", value=1 << 60), "$.base.vocab_size"),
        (_set("base", "kind", value="oracle"), "$.base.kind"),
        (_set("base", "embedding_dtype", value="float8"), "$.base.embedding_dtype"),
        (_set("base", "fingerprint", value="sha256:0"), "$.base.fingerprint"),
        (_set("base", "cache", value=None), "$.base.cache"),
        (_set("base", "cache", "layers", value=10**9), "$.base.cache.layers"),
        (_set("base", "max_positions", value=-1), "$.base.max_positions"),
        (_set("base", "surprise", value=1), "$.base"),
        (_set("base", "table", value={"encoding": "float64"}), "$.base.table.encoding"),
        (_set("base", "table", value={"encoding": "Q8_0", "rows_start": 0}), "$.base.table.rows_start"),
        (_set("base", "table", value={"encoding": "float32", "rows_start": -1}), "$.base.table.rows_start"),
        (_set("base", "table", value={"encoding": "Q6_K"}), "$.base.table.encoding"),
        (_set("base", "table", value={"encoding": "bfloat16", "scale": 0}), "$.base.table.scale"),
        (_set("variants", value={}), "$.variants"),
        (_set("variants", "portable", "vision_graph", value="base/x.plan"), "$.variants['portable'].files"),
        (
            _set("variants", "portable", "vision_graph", value="base/portable/model.onnx"),
            "$.variants['portable'].vision_graph",
        ),
        (_set("tasks", "r8", "rank", value=33), "$.tasks['r8'].rank"),
        (_set("tasks", "r8", "rank", value={"text": 33}), "$.tasks['r8'].rank"),
        (_set("tasks", "r8", "rank", value={"text": 4, "image": 4}), "$.tasks['r8'].rank"),
        (_set("tasks", "r8", "scope", value="none"), "$.tasks['r8'].scope"),
        (_set("tasks", "r8", "graph", value="tasks/other/adapter.onnx"), "$.files['tasks/other/adapter.onnx']"),
        (_set("files", "base/tokenizer.json", "size_bytes", value=-1), "$.files['base/tokenizer.json'].size_bytes"),
        (
            _set("files", "base/tokenizer.json", "size_bytes", value=1 << 60),
            "$.files['base/tokenizer.json'].size_bytes",
        ),
        (_set("files", "base/tokenizer.json", "sha256", value="md5:1"), "$.files['base/tokenizer.json'].sha256"),
        (_set("files", "../secret", value={"sha256": DIGEST, "size_bytes": 1}), "$.files['../secret']"),
        (_set("files", "/etc/passwd", value={"sha256": DIGEST, "size_bytes": 1}), "$.files['/etc/passwd']"),
        (_set("files", "base/../../x", value={"sha256": DIGEST, "size_bytes": 1}), "$.files['base/../../x']"),
        (_set("files", "", value={"sha256": DIGEST, "size_bytes": 1}), "$.files['']"),
        (_set("files", "base\\x", value={"sha256": DIGEST, "size_bytes": 1}), "$.files['base\\\\x']"),
    ],
)
def test_the_wrong_field_is_named(change: Callable[[dict[str, Any]], None], field: str) -> None:
    value = fields()
    change(value)
    with pytest.raises(ManifestError) as caught:
        decode(value)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_a_newer_schema_says_to_upgrade() -> None:
    with pytest.raises(ManifestError, match=r"schema_version is 7.*newer; upgrade adalink-kit"):
        decode(fields() | {"schema_version": 7})


def test_manifest_of_version_3_is_read_and_version_2_says_to_export_again() -> None:
    older = encode_manifest(msgspec.convert(fields() | {"schema_version": 3}, Manifest))
    assert decode_manifest(older).schema_version == 3
    with pytest.raises(ManifestError, match=r"schema_version is 2.*older; export it again"):
        decode(fields() | {"schema_version": 2})


def test_every_truncation_is_refused() -> None:
    whole = json.dumps(fields()).encode()
    for length in range(0, len(whole), 11):
        with pytest.raises(ManifestError):
            decode_manifest(whole[:length])


def test_no_byte_can_change_unnoticed() -> None:
    whole = encode_manifest(msgspec.convert(fields(), Manifest))
    for position in range(len(whole)):
        for flipped in (whole[position] ^ 1, whole[position] ^ 0x80, ord(" ")):
            if flipped != whole[position]:
                with pytest.raises(ManifestError):
                    decode_manifest(whole[:position] + bytes([flipped]) + whole[position + 1 :])


def test_an_enormous_manifest_is_not_parsed(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as stream:
        stream.truncate((64 << 20) + 1)
    with pytest.raises(ManifestError, match="at most"):
        read_manifest(tmp_path)


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"holds no manifest\.json.*adalink export base"):
        read_manifest(tmp_path)
    with pytest.raises(DeploymentError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")


def test_links_out_of_the_deployment_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    root = tmp_path / "deployment"
    (root / "base").mkdir(parents=True)
    (root / "base" / "link").symlink_to(outside)
    (root / "base" / "loop").symlink_to(root / "base" / "loop")
    (root / "base" / "inside").write_text("fine")
    with pytest.raises(IntegrityError, match="outside the deployment"):
        locate(root, "base/link")
    with pytest.raises(IntegrityError, match="cannot be found"):
        locate(root, "base/loop")
    with pytest.raises(IntegrityError, match="cannot be found"):
        locate(root, "base/missing")
    with pytest.raises(IntegrityError, match="not a file"):
        locate(root, "base")
    assert locate(root, "base/inside").read_text() == "fine"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a.b", "-x", "é", "x" * 65, "a b", "a\n"])
def test_task_names_that_cannot_be_folders(name: str) -> None:
    with pytest.raises(DeploymentError, match="task name"):
        check_task_name(name)
    value = fields()
    value["tasks"][name] = value["tasks"].pop("r8")
    with pytest.raises(ManifestError):
        decode(value)


def test_a_manifest_nested_too_deeply_is_refused() -> None:
    with pytest.raises(ManifestError, match=r"manifest\.json: \$: its values are nested too deeply"):
        decode_manifest(b'{"more": ' + b"[" * 200_000)


@pytest.mark.parametrize("token", [-1, 100, 1 << 40, 10**30])
@pytest.mark.parametrize("field", ["eos_token_ids[1]", "pad_token_id", "bos_token_id", "decoder_start_token_id"])
def test_ids_out_of_the_vocabulary_are_refused_by_name(field: str, token: int) -> None:
    value = fields()
    if field.endswith("]"):
        value["base"]["eos_token_ids"] = [2, token]
    else:
        value["base"][field] = token
    with pytest.raises(ManifestError, match=rf"\$\.base\.{re.escape(field)}") as raised:
        decode(value)
    assert raised.value.field == f"$.base.{field}"


def test_an_encoder_decoder_says_how_its_decoder_begins() -> None:
    value = fields()
    value["base"]["kind"] = "encoder-decoder"
    with pytest.raises(ManifestError, match="decoder_start_token_id is None, expected the id"):
        decode(value)


@pytest.mark.parametrize("types", [0, -1, 2, 1 << 20])
def test_token_types_are_those_of_an_encoder(types: int) -> None:
    value = fields()
    value["base"]["token_types"] = types
    with pytest.raises(ManifestError, match=r"\$\.base\.token_types is .*expected 1 to 1 for this kind"):
        decode(value)
