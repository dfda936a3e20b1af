"""KV prefixes: keys and values of every layer that stand before a task's first position (prefix tuning).

An engine has the input for them already: the KV cache with which a row begins. They take positions, so the text begins
at position ``n``. Callers never see them. They come before the soft prompt, and no bottleneck acts on them. The
prefix cache of prompts is something else: it holds what the engine computed, and begins after them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.kv_prefix_spec import KV_PREFIX_NAME, KvPrefixSpec
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.safetensors import as_stored


@dataclass(frozen=True, eq=False)
class KvPrefix:
    """The KV prefix of one task.

    Attributes:
        digest: the adapter's.
        spec: its length and origin.
        states: shape ``(2 * layers, kv_heads, n, head_dim)`` in the base's dtype: key and value of each layer in turn,
            as a KV cache has them. Do not write to them.
    """

    digest: str
    spec: KvPrefixSpec
    states: Array

    def __len__(self) -> int:
        return self.spec.tokens

    def followed_by(self, states: Array | None) -> Array:
        """Keys and values of the prefix and of the positions after it, as ``SlotState.begin`` takes them."""
        return self.states if states is None else np.concatenate([self.states, states], axis=2)


def kv_prefixes_of(adapter: Adapter, base: Base) -> list[KvPrefix]:
    """The KV prefix of an adapter in the base's dtype: a list of one or none."""
    spec, weight = adapter.config.kv_prefix, adapter.weights.get(KV_PREFIX_NAME)
    if spec is None or weight is None:
        return []
    states = as_stored(weight, base.embedding_dtype)
    return [KvPrefix(adapter.digest, spec, states.reshape(-1, *states.shape[2:]))]
