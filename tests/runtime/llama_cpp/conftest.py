"""A tiny Llama in float32 for llama.cpp, exported once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.llama_cpp import BACKEND, build_gguf
from helpers.runtime import Tiny

from adalink.runtime import Deployment


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build_gguf(tmp_path_factory.mktemp("gguf"), "llama")


@pytest.fixture
def opened(gguf: Tiny) -> Iterator[Deployment]:
    with Deployment.open(gguf.folder, BACKEND, threads=1, slots=3, context=64, prefix_cache_bytes=1 << 20) as opened:
        yield opened
