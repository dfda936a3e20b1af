"""Prompts that were run before: the KV cache of their tokens, to be gone on from instead of computed again.

Keys and values of a token depend on the tokens up to it and on how they were embedded, so a beginning of a prompt may
be used again under the same base and the same adapter, and only there. The key is what the adapter *is*, its digest,
not its name: a name may stand for another adapter tomorrow.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.logs import get_logger
from adalink.runtime.storage.lru import LruTable

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class PrefixKey:
    """What cached tokens were computed with.

    Attributes:
        base: fingerprint of the base; its variant is one for the life of a cache.
        adapter: digest of the adapter; empty for the base model.
        scope: scope of the adapter.
    """

    base: str
    adapter: str
    scope: str


class PrefixCache:
    """States of prompts within a budget; the least recently used go first. Safe for use from several threads."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._kept: LruTable[tuple[PrefixKey, bytes], Array] = LruTable(attrgetter("nbytes"), budget_bytes)
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """What is held."""
        return self._kept.size

    def find(self, key: PrefixKey, tokens: Array) -> Array | None:
        """The states of the longest beginning of ``tokens`` that was computed before.

        Args:
            key: what they would be computed with.
            tokens: int64, the prompt; its last token is always left to compute, since it gives the logits.

        Returns:
            States with shape ``(2 * layers, kv_heads, n, head_dim)`` of the first ``n`` tokens, or ``None``; not to be
            written to.
        """
        best, length = None, 0
        with self._lock:
            for name in self._kept.entries:
                if name[0] == key:
                    common = _common(np.frombuffer(name[1], np.int64), tokens[:-1])
                    if common > length:
                        best, length = name, common
            if best is None:
                return None
            self._kept.touch(best)
            _LOG.debug("prefix cache hit: %d of %d positions", length, len(tokens))
            return self._kept.entries[best][:, :, :length]

    def add(self, key: PrefixKey, tokens: Array, states: Array) -> None:
        """Keep the states of a prompt, unless they alone exceed the budget.

        Args:
            key: what they were computed with.
            tokens: int64, the prompt.
            states: shape ``(2 * layers, kv_heads, tokens, head_dim)``; kept as it is, so not to be written to again.
        """
        if states.nbytes > self._budget_bytes:
            return
        name = (key, tokens.tobytes())
        with self._lock:
            self._kept.put(name, states)


def _common(first: Array, second: Array) -> int:
    """How many numbers two arrays have in common from the beginning."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length
