"""The words that install an extra: of an installed kit by its name, of a checkout by its folder."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from adalink.runtime import extras


def test_the_command_is_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "version", lambda name: "0.2.0")
    assert extras.install_command("cpu,export") == "pip install 'adalink-kit[cpu,export]'"

    def find_none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "version", find_none)
    assert extras.install_command("cpu") == "pip install '.[cpu]' in a checkout of the kit"
