"""Prefix cache: the KV cache of earlier prompts, reused for prompts with the same beginning.

Keys and values of a token depend on the tokens up to it and on their embeddings. A prefix is therefore reused only
under the same base and adapter. The adapter is identified by its digest, since its name may refer to another adapter
later. A task's KV prefix is not stored again with every prompt: prompts begin after it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.logs import get_logger
from adalink.runtime.storage.lru import LruTable

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class PrefixKey:
    """Base and adapter that cached states were computed with.

    Attributes:
        base: fingerprint of the base; a cache serves a single variant.
        adapter: digest of the adapter; empty for the base model.
        scope: scope of the adapter.
        kv_prefix: digest of the adapter whose KV prefix stands before the prompt; empty for none.
    """

    base: str
    adapter: str
    scope: str
    kv_prefix: str = ""


class PrefixCache:
    """Keys and values of prompts within a budget, evicted by least recent use; safe for several threads."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._kept: LruTable[tuple[PrefixKey, bytes], Array] = LruTable(budget_bytes)
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Bytes of all cached states."""
        return self._kept.size

    def find(self, key: PrefixKey, tokens: Array) -> Array | None:
        """Cached states of the longest known prefix of ``tokens``.

        Args:
            key: base and adapter of the prompt.
            tokens: int64, the prompt; its last token is never taken from the cache, since its logits are needed.

        Returns:
            States with shape ``(2 * layers, kv_heads, n, head_dim)`` of the first ``n`` tokens, or ``None``; do not
            write to them.
        """
        best, length = None, 0
        with self._lock:
            for name in self._kept.entries:
                if name[0] == key:
                    common = _common(np.frombuffer(name[1], np.int64), tokens[:-1])
                    if common > length:
                        best, length = name, common
            states = None if best is None else self._kept.get(best)
            if states is None:
                return None
            _LOG.debug("prefix cache hit: %d of %d positions", length, len(tokens))
            return states[:, :, :length]

    def add(self, key: PrefixKey, tokens: Array, states: Array) -> None:
        """Cache the states of a prompt, or of a prompt with its reply, unless they alone exceed the budget.

        They take the place of those of its beginning alone.

        Args:
            key: base and adapter of the prompt.
            tokens: int64, the prompt.
            states: shape ``(2 * layers, kv_heads, tokens, head_dim)``; kept without a copy: do not write to it again.
        """
        if states.nbytes > self._budget_bytes:
            return
        name = (key, tokens.tobytes())
        with self._lock:
            for other in [other for other in self._kept.entries if other[0] == key and other != name]:
                if name[1].startswith(other[1]):
                    self._kept.pop(other)
            self._kept.put(name, states, states.nbytes)


def _common(first: Array, second: Array) -> int:
    """Length of the common prefix of two arrays."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length
