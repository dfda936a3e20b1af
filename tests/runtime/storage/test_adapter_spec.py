"""Settings of an adapter are declared once: a new one reaches every file and report by itself."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import msgspec
import pytest
from helpers.paths import REPOSITORY
from helpers.warm_python import WarmPython

from adalink.runtime.storage.adapter import AdapterConfig
from adalink.runtime.storage.adapter_spec import AdapterSpec, MethodSpec, settings_at_default, settings_of
from adalink.runtime.storage.manifest import Task
from adalink.training.method.config import AdaLinkConfig

PACKAGES = ("runtime", "training", "export", "tools")


def test_new_setting_reaches_every_file_by_one_line(tmp_path: Path, warm_torch: WarmPython) -> None:
    paths = os.pathsep.join(str(REPOSITORY / folder) for folder in ("src", "tests"))
    command = [sys.executable, "-m", "helpers.new_setting", str(tmp_path)]
    result = warm_torch.run(command, env=os.environ | {"PYTHONPATH": paths})
    assert result.returncode == 0, result.stderr
    silent, telling = json.loads(result.stdout.splitlines()[-1])
    everywhere = ("report", "loaded", "config", "manifest", "inspect deployment", "inspect adapter")
    assert "flavour is 7, the adapter's 0" in telling.pop("parity")
    assert telling == dict.fromkeys(everywhere, 7) | {"metadata": "7"}
    # Where it says nothing, digests and graphs stay as they were before there was such a setting.
    assert "flavour" not in silent.pop("parity")
    assert silent == dict.fromkeys(everywhere, 0) | {"config": None, "metadata": None}


@pytest.mark.parametrize("setting", ["soft_tokens", "input"])
def test_settings_are_declared_once(setting: str) -> None:
    """``adalink train`` aside, whose options are what it takes from a command line."""
    declared = [
        (path.relative_to(REPOSITORY).as_posix(), node.name)
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name != "TrainOptions" and _declares(node, setting)
    ]
    assert declared == [("runtime/storage/adapter_spec.py", "AdapterSpec")]


def _declares(node: ast.ClassDef, name: str) -> bool:
    fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
    return any(isinstance(field, ast.Name) and field.id == name for field in fields)


@pytest.mark.parametrize("kind", [AdapterConfig, AdaLinkConfig, Task])
def test_every_holder_inherits_the_settings(kind: type[AdapterSpec]) -> None:
    assert issubclass(kind, AdapterSpec)
    assert set(AdapterSpec.__struct_fields__) <= set(kind.__struct_fields__)


def test_settings_of_leaves_out_what_a_holder_adds() -> None:
    config = AdaLinkConfig(rank={"text": 2, "image": 3}, modalities=("text", "image"), dropout=0.5, soft_tokens=4)
    known = {"activation": "identity", "scope": "all", "modalities": ("text", "image"), "input": "embeddings"}
    known |= {"head": None, "labels": None, "kv_prefix": None, "weight_dtype": "float32", "nested": False}
    settings = {"rank": {"text": 2, "image": 3}, "soft_tokens": 4, **known}
    assert settings_of(config) == settings
    assert settings_of(config, MethodSpec) == settings | {"bias": False}
    assert settings_at_default(config) == {"input", "head", "labels", "kv_prefix", "weight_dtype", "nested"}


def test_a_manifest_written_before_later_settings_opens() -> None:
    files = {"graph": "a", "config": "b", "weights": "c", "adapter_digest": "d"}
    older = files | {"rank": 2, "activation": "gelu", "modalities": ["text"], "scope": "all"}
    task = msgspec.json.decode(json.dumps(older), type=Task)
    assert (task.soft_tokens, task.input, task.head, task.fold) == (0, "embeddings", None, None)
    later = {"soft_tokens": 0, "input": "embeddings", "head": None, "labels": None, "fold": None, "head_graph": None}
    later |= {"kv_prefix": None, "weight_dtype": "float32", "nested": False}
    assert (
        msgspec.json.encode(task, order="sorted")
        == json.dumps(older | later, sort_keys=True, separators=(",", ":")).encode()
    )
    with pytest.raises(msgspec.ValidationError, match="unknown field `bias`"):
        msgspec.json.decode(json.dumps(older | {"bias": True}), type=Task)
