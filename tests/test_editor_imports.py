"""What an editor sees through src/adalink: every import resolves, and definitions keep their types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import REPOSITORY

CODE = """
from adalink.export import export_adapter, export_base, export_engine
from adalink.runtime import Deployment, RequestError
from adalink.runtime.storage.manifest import Manifest
from adalink.training import AdaLinkConfig, attach, train

reveal_type(Deployment.open("x").manifest)
reveal_type(AdaLinkConfig(rank=4).rank)
"""
WRONG = """
from adalink.runtime import NoSuchName
from adalink.runtime.no_such_module import anything
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (CODE, ['Type of "Deployment.open("x").manifest" is "Manifest"', 'Type of "AdaLinkConfig(rank=4).rank" is']),
        (WRONG, ['"NoSuchName" is unknown import symbol', 'Import "adalink.runtime.no_such_module" could not be']),
    ],
    ids=["found", "missing"],
)
def test_pyright_follows_imports(tmp_path: Path, code: str, expected: list[str]) -> None:
    (tmp_path / "used.py").write_text(code)
    config = {"typeCheckingMode": "basic", "extraPaths": [str(REPOSITORY / "src")], "useLibraryCodeForTypes": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-m",
        "basedpyright",
        "--outputjson",
        "--pythonpath",
        sys.executable,
        "-p",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    messages = [entry["message"] for entry in json.loads(done.stdout)["generalDiagnostics"]]
    assert len(messages) == len(expected), messages
    for message, beginning in zip(messages, expected, strict=True):
        assert message.startswith(beginning)
