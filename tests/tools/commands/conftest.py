"""A deployment that chats, exported once."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.chats import make_chat_deployment


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_deployment(tmp_path_factory.mktemp("chat"))
