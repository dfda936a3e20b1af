"""What an editor sees through src/adalink: every import resolves, and definitions keep their types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
EXPECTED = (
    ("used.py", 'Type of "AdaLinkConfig(rank=4).rank" is'),
    ("used.py", 'Type of "Deployment.open("x").manifest" is "Manifest"'),
    ("wrong.py", '"NoSuchName" is unknown import symbol'),
    ("wrong.py", 'Import "adalink.runtime.no_such_module" could not be resolved'),
)


def test_pyright_follows_imports(tmp_path: Path) -> None:
    """One run for both files: it reads PyTorch's types, which takes seconds."""
    (tmp_path / "used.py").write_text(CODE)
    (tmp_path / "wrong.py").write_text(WRONG)
    config = {
        "typeCheckingMode": "basic",
        "extraPaths": [str(REPOSITORY / "src")],
        "stubPath": str(REPOSITORY / "typings"),
        "useLibraryCodeForTypes": False,
    }
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
    found = sorted(
        (Path(entry["file"]).name, entry["message"]) for entry in json.loads(done.stdout)["generalDiagnostics"]
    )
    assert len(found) == len(EXPECTED), found
    for (file, message), (expected_file, beginning) in zip(found, EXPECTED, strict=True):
        assert file == expected_file
        assert message.startswith(beginning)
