"""What the tests of engines, and those of models that take images, share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from adalink.runtime.trt.api import Api, load_api

if TYPE_CHECKING:
    from helpers.vision_deployments import VisionExports


@pytest.fixture(scope="module")
def api() -> Api:
    return load_api("tensorrt-rtx")


@pytest.fixture(scope="session")
def vision_exports(tmp_path_factory: pytest.TempPathFactory) -> VisionExports:
    """Exports by family; nothing may be written to them."""
    from helpers.vision_deployments import VisionExports

    return VisionExports(tmp_path_factory.mktemp("vision-exports"))
