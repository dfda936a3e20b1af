"""KV prefix of a task: keys and values of every layer that stand before its first position."""

from __future__ import annotations

import re

import msgspec

# Shape (layers, 2, kv_heads, tokens, head_dim): keys, then values, as they are in the cache.
KV_PREFIX_NAME = "kv_prefix"
# Numbers of the adapter folder's file.
KV_PREFIX_DTYPES = ("float32", "float16")
_MOST_TOKENS = 1 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class KvPrefixSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Length and origin of a KV prefix.

    Attributes:
        tokens: positions that it takes.
        dtype: one of ``KV_PREFIX_DTYPES``.
        variant_digest: digest of the base variant that computed it from a text
            (`adalink.runtime.storage.variants.variant_digest`): no other variant gives these numbers. Empty for one
            that was trained, which any variant of its base takes.
    """

    tokens: int
    dtype: str = "float32"
    variant_digest: str = ""

    @property
    def continues_text(self) -> bool:
        """Whether prompts go on from a text: no token that begins a text stands between."""
        return bool(self.variant_digest)


def fault_in_kv_prefix(spec: KvPrefixSpec) -> str | None:
    """What is wrong with a KV prefix, in words; ``None`` if nothing."""
    if not 1 <= spec.tokens <= _MOST_TOKENS:
        return f"kv_prefix.tokens is {spec.tokens}, expected 1 to {_MOST_TOKENS}"
    if spec.dtype not in KV_PREFIX_DTYPES:
        return f"kv_prefix.dtype is {spec.dtype!r}, expected {' or '.join(KV_PREFIX_DTYPES)}"
    if spec.variant_digest and not _DIGEST.fullmatch(spec.variant_digest):
        return f"kv_prefix.variant_digest is {spec.variant_digest!r}, expected 'sha256:' and 64 digits, or nothing"
    return None
