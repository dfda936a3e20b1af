"""Parameters of which the quick tests take some, and the slow tests the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], *quick: Any) -> list[Any]:
    """The values as parameters: all but ``quick`` are marked slow."""
    values = list(values)
    assert set(quick) <= set(values)
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
