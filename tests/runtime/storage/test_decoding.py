"""JSON and TOML: whatever is wrong with a text is one exception, and no other module decodes them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.paths import REPOSITORY

from adalink.runtime.storage.decoding import decode_json, decode_toml


class Pair(msgspec.Struct):
    left: int
    right: float = 0.0


BAD_JSON = {
    "empty": b"",
    "cut off": b'{"left": 1',
    "not UTF-8": b'{"left": "\xff"}',
    "arrays": b"[" * 100_000,
    "objects": b'{"left":' * 100_000,
    "digits": b'{"left": ' + b"1" * 5_000 + b"}",
    "infinite": b'{"left": 1, "right": 1e400}',
    "no number": b'{"left": 1, "right": NaN}',
    "half a character": b'{"left": "\\ud800"}',
    "another type": b'{"left": "1"}',
    "nothing of it": b"[]",
}
BAD_TOML = {
    "cut off": b"left = [",
    "not UTF-8": b'left = "\xff"',
    "arrays": b"left = " + b"[" * 100_000,
    "keys": b"left." * 1_000 + b"right = 1",
    "tables": b"left = " + b"{a = " * 20_000,
    "digits": b"left = " + b"1" * 5_000,
    "hexadecimal": b"left = 0x" + b"f" * 100_000,
    "another type": b'left = "1"',
    "control character": b"left = 1\x00",
    "no date": b"left = 1979-05-27T25:00:00",
}


@pytest.mark.parametrize("kind", [Pair, dict[str, Any], dict[str, int]], ids=["struct", "any", "numbers"])
@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_cannot_be_decoded(name: str, kind: Any) -> None:
    if kind == dict[str, Any] and name == "another type":
        assert decode_json(BAD_JSON[name], kind) == {"left": "1"}
        return
    with pytest.raises(msgspec.DecodeError, match=r"."):
        decode_json(BAD_JSON[name], kind)


@pytest.mark.parametrize("name", BAD_TOML)
def test_toml_that_cannot_be_decoded(name: str) -> None:
    with pytest.raises(msgspec.DecodeError, match=r"."):
        decode_toml(BAD_TOML[name], Pair)


def test_what_is_right_is_decoded() -> None:
    assert decode_json(b'{"left": 1, "right": 2}', Pair) == Pair(1, 2.0)
    assert decode_json('{"left": [1, {}]}', dict[str, Any]) == {"left": [1, {}]}
    assert decode_toml(b"left = 1\nright = 0.5", Pair) == Pair(1, 0.5)


def test_a_missing_field_keeps_its_path() -> None:
    with pytest.raises(msgspec.ValidationError, match="missing required field `left`"):
        decode_json(b"{}", Pair)


# What decodes without ``decoding``, and why that is right.
ALLOWED = {
    "runtime/storage/decoding.py": "the one reader",
    "runtime/storage/safetensors.py": "headers may repeat names, which only Python's json lets through to be found",
    "runtime/rows/jsonl.py": "the reader of lines",
    "runtime/sampling/structured_output.py": "a schema of the caller's, where whatever goes wrong is converted",
    "tools/rows/rows.py": "decodes lines for the reader of lines, which converts every error",
    "tools/rows/text_rows.py": "likewise",
    "studies/experiment/sources.py": "likewise",
    "training/data/rows.py": "likewise",
    "training/data/labelled_rows.py": "likewise",
    "training/loop/checkpoints.py": "transformers writes NaN into its state, which is no JSON",
    "training/models/weight_files.py": "as transformers reads the same files: Python's json takes NaN",
    "export/base/files.py": "what the package tokenizers has just written",
    "training/models/gguf/tokenizer.py": "likewise",
    "export/base/generation.py": "as transformers reads the same file",
    "tools/parity/reference/file_tensors.py": "verify's own reader, which shares nothing with what it checks",
    "export/lora/place.py": "what may lie where a LoRA is to be written; any error means that it is none",
    "export/lora/reading.py": "what the kit has just written, read as the host does",
    "tools/doctor/probe.py": "the answer of the kit's own child process",
    "tools/parity/checks/swap_worker.py": "likewise",
    "tools/quickstart/steps.py": "what it has just encoded",
}
DECODERS = {
    "json.loads",
    "json.load",
    "msgspec.json.decode",
    "msgspec.json.Decoder",
    "msgspec.toml.decode",
    "tomllib.loads",
    "tomllib.load",
}


def decoders_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & DECODERS


def test_no_other_module_decodes_files() -> None:
    folders = ("runtime", "export", "training", "tools", "studies")
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    found = {path.relative_to(REPOSITORY).as_posix() for path in paths if decoders_in(path)}
    assert found <= ALLOWED.keys(), "decode with adalink.runtime.storage.decoding, or say here why not"
