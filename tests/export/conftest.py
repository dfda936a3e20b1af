"""What the tests of engines share."""

from __future__ import annotations

import pytest

from adalink.runtime.trt.api import Api, load_api


@pytest.fixture(scope="module")
def api() -> Api:
    return load_api("tensorrt-rtx")
