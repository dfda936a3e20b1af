"""How often this process has asked a builder for an engine: what a receipt counts."""

from __future__ import annotations

import itertools

_calls = itertools.count()
_count = 0


def count_builder_call() -> None:
    """Note one call of a builder; whoever calls ``build_serialized_network`` calls this first."""
    global _count
    _count = next(_calls) + 1


def builder_calls() -> int:
    """Calls noted so far; a task swap leaves the number as it was."""
    return _count
