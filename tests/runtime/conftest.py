"""Small real deployments, exported once a session."""

from __future__ import annotations

import pytest
from runtime_support import Tiny, build
from seeing_support import Seeing, build_seeing


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build("llama", tmp_path_factory.mktemp("llama"), ("text", "image"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build("t5", tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    return build_seeing(tmp_path_factory.mktemp("seeing"))
