"""Methods that implement a protocol have its documentation, and cannot name a method that it lacks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from adalink.runtime.engine import DecodeState, Engine, SlotState
from adalink.runtime.implements import implements
from adalink.runtime.ort.dynamic_cache import DynamicCacheDecodeState, DynamicCacheEngine


def test_implements_method_has_the_docstring_of_the_protocol() -> None:
    assert inspect.getdoc(DynamicCacheEngine.run) == inspect.getdoc(Engine.run)
    assert "Raises:" in (inspect.getdoc(DynamicCacheEngine.start) or "")
    assert inspect.getdoc(DynamicCacheDecodeState.logits) == inspect.getdoc(DecodeState.logits)


def test_implements_method_that_the_protocol_lacks_is_refused() -> None:
    with pytest.raises(AttributeError, match="strat"):

        class Typo:
            @implements(Engine)
            def strat(self, feeds: Any) -> None:
                raise AssertionError


def test_parameters_are_those_of_the_protocol() -> None:
    """Callers know the protocol alone."""
    with pytest.raises(TypeError, match=r"states lacks start of SlotState"):

        class _State:
            @implements(SlotState)
            def states(self, row: int, length: int) -> None: ...
