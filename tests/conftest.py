"""What every test shares: no memory in the home of whoever runs the tests, and no waiting for disks."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

import pytest
from helpers.warm_python import WarmPython

_IMPORTS = ("onnxruntime", "torch", "transformers.models.llama.modeling_llama", "transformers.trainer")


_frozen_at = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Leave what imports made out of garbage collection: PyTorch's trainer collects at each start, for a second."""
    global _frozen_at
    if len(sys.modules) > _frozen_at + 100:
        gc.collect()
        gc.freeze()
        _frozen_at = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def own_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_flushing() -> Iterator[None]:
    """Nobody cuts the power: a third of the time would go into waiting for disks.

    What is flushed, and in which order, is asked of calls that are watched.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def warm_torch() -> Iterator[WarmPython]:
    """Processes of their own, with PyTorch and transformers imported and nothing of the kit."""
    python = WarmPython(_IMPORTS)
    yield python
    python.close()
