"""What the tests of the writer, of engines, and those of models that take images share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adalink.runtime.trt.api import Api, load_api

if TYPE_CHECKING:
    from helpers.vision_deployments import VisionExports


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment with the task ``topics``, beside it two adapters, ``one`` and ``two``: not to be written to."""
    from helpers.runtime import random_adapter, write_adapter
    from helpers.tiny_models import FAMILIES

    from adalink.export.adapter.export import export_adapter
    from adalink.export.base.export import export_base

    root = tmp_path_factory.mktemp("pristine")
    fingerprint = export_base(FAMILIES["llama"](), root / "deployment").base.fingerprint
    for seed, name in enumerate(("one", "two")):
        settings = {"rank": 4, "activation": "gelu", "bias": True, "scope": "all"}
        write_adapter(root / name, random_adapter(fingerprint, 48, seed, **settings))
    export_adapter(root / "one", root / "deployment", name="topics")
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(pristine, tmp_path / "root")


@pytest.fixture(scope="module")
def api() -> Api:
    return load_api("tensorrt-rtx")


@pytest.fixture(scope="session")
def vision_exports(tmp_path_factory: pytest.TempPathFactory) -> VisionExports:
    """Exports by family; nothing may be written to them."""
    from helpers.vision_deployments import VisionExports

    return VisionExports(tmp_path_factory.mktemp("vision-exports"))
