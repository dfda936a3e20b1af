"""The start-up figures react to what they measure."""

import os
import time

import pytest
from helpers.tiny_deployments import make_deployment

from adalink.runtime.storage import verification_cache as verified
from adalink.tools.bench.startup import import_seconds, open_seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_deployment(tmp_path_factory.mktemp("startup"), "llama", {})[1]


def test_a_slow_import_shows(monkeypatch, tmp_path):
    usual = import_seconds(repeats=1)
    slow = tmp_path / "msgspec"
    slow.mkdir()
    (slow / "__init__.py").write_text(
        "import sys, time\n"
        "time.sleep(1)\n"
        f"sys.path.remove({str(tmp_path)!r})\n"
        "del sys.modules['msgspec']\n"
        "import msgspec\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert import_seconds(repeats=1) >= 1 > usual


def test_a_slow_check_shows_in_the_deployment_alone(folder, monkeypatch):
    recall = verified._recall

    def slow(memory):
        time.sleep(0.5)
        return recall(memory)

    monkeypatch.setattr(verified, "_recall", slow)
    opened, bare = open_seconds(folder, 1, repeats=2)
    assert opened >= 0.5
    assert 0 < bare < opened
