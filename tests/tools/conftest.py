"""What the tests of `adalink verify` share: fresh processes that were asked the same before."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adalink.runtime.storage.digest import digest_file
from adalink.tools.parity import check_swap
from adalink.tools.parity.swap_worker import run_fresh


@pytest.fixture(scope="session", autouse=True)
def fresh_processes_once() -> Iterator[None]:
    """Ask equal deployments the same question once: nothing that a test plants in this process reaches a fresh one."""
    answers: dict[Any, dict[str, Any]] = {}

    def run_once(request: dict[str, Any]) -> dict[str, Any]:
        folder = Path(request["path"])
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        key = (
            json.dumps(request | {"path": ""}),
            *((path.relative_to(folder), digest_file(path)) for path in paths),
        )
        if key not in answers:
            answers[key] = run_fresh(request)
        return copy.deepcopy(answers[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_swap, "run_fresh", run_once)
        yield
