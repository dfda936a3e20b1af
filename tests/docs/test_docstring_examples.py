"""Examples in docstrings give what they say they give."""

from __future__ import annotations

import doctest
import importlib
import types

import pytest
from helpers.paths import REPOSITORY

FOLDERS = ("runtime", "serving", "training", "export", "tools")
MODULES = sorted(
    "adalink." + ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for folder in FOLDERS
    for path in (REPOSITORY / folder).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def failures(module):
    """How many examples of a module fail; there must be some examples."""
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0, f"{module.__name__}: no example was run"
    return result.failed


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_hold(name):
    assert failures(importlib.import_module(name)) == 0


def test_wrong_docstring_example_is_found(capsys):
    module = types.ModuleType("planted", ">>> 1 + 1\n3\n")
    assert failures(module) == 1
    assert "planted" in capsys.readouterr().out
