"""A deployment whose tasks change while it is open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.runtime import Tiny
from helpers.versions import Versions

from adalink.runtime import Deployment


@pytest.fixture
def versions(llama: Tiny, tmp_path: Path) -> Versions:
    return Versions(llama, tmp_path)


@pytest.fixture
def opened(versions: Versions) -> Iterator[Deployment]:
    with Deployment.open(versions.folder, threads=1) as deployment:
        yield deployment
