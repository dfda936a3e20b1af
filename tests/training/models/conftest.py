"""What the tests of models share: each begins as a process that has asked no hub yet."""

from __future__ import annotations

import pytest

from adalink.training.models import hub


@pytest.fixture(autouse=True)
def no_hub_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_REACHED", set())
    monkeypatch.setattr(hub, "_LOCAL", set())
