"""Builder calls of this process: how often it asked for a compiled engine. Receipts report the count."""

from __future__ import annotations

import itertools

_calls = itertools.count()
_count = 0


def count_builder_call() -> None:
    """Count one builder call; call this before ``build_serialized_network``."""
    global _count
    _count = next(_calls) + 1


def builder_calls() -> int:
    """Builder calls so far; switching tasks adds none."""
    return _count
