"""The runtime stays light: measured in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

HEAVY = ("torch", "transformers", "onnx", "onnxscript", "optimum", "peft")


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_loads_no_engine_and_no_framework() -> None:
    loaded = loaded_by("from adalink.runtime import Deployment")
    assert "adalink.runtime.deployment" in loaded
    assert not loaded & {*HEAVY, "onnxruntime", "tokenizers", "jinja2", "rich", "click"}


def test_running_and_generating_loads_no_framework(llama: Any) -> None:
    code = (
        "from adalink.runtime import Deployment\n"
        f"with Deployment.open({str(llama.folder)!r}) as d:\n"
        "    d.generate(['abc'], tasks='alpha', max_new_tokens=3, chat=True)\n"
    )
    loaded = loaded_by(code)
    assert "onnxruntime" in loaded
    assert not loaded & set(HEAVY)
