"""What the tests of `adalink verify` share: fresh processes that were asked the same before."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.warm_python import WarmPython

from adalink.runtime.storage.digest import digest_file
from adalink.tools.common.child_process import python_command
from adalink.tools.parity.checks import swap, swap_worker

_IMPORTS = (
    "adalink.runtime.deployment",
    "adalink.runtime.ort.backend",
    "adalink.runtime.ort.open_session",
    "adalink.runtime.ort.shared_adapter_graph",
    "adalink.runtime.ort.static_cache",
    "adalink.runtime.tasks.host_embedder",
    "adalink.tools.common.child_process",
    "onnxruntime",
)


@pytest.fixture(scope="session", autouse=True)
def fresh_processes_once() -> Iterator[None]:
    """Ask equal deployments the same question once: nothing that a test plants in this process reaches a fresh one.

    That process has the runtime's imports done; `test_child_process.py` starts one that has not.
    """
    answers: dict[Any, dict[str, Any]] = {}
    warm = WarmPython(_IMPORTS, python_command()[1:-2])

    def run_once(request: dict[str, Any]) -> dict[str, Any]:
        folder = Path(request["path"])
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        key = (
            json.dumps(request | {"path": ""}),
            *((path.relative_to(folder), digest_file(path)) for path in paths),
        )
        if key not in answers:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(swap_worker, "subprocess", SimpleNamespace(run=warm.run))
                answers[key] = swap_worker.run_fresh(request)
        return copy.deepcopy(answers[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap, "run_fresh", run_once)
        yield
    warm.close()
