"""What an export says of the pooling that the checkpoint's sentence-transformers files name."""

from __future__ import annotations

from adalink.runtime.storage.manifest import Base


def report_pooling(base: Base) -> list[str]:
    """Lines for the user: the pooling of an encoder, or why there is none."""
    pooling = base.pooling
    if base.kind == "decoder" or pooling is None:
        return []
    if pooling.unsupported:
        return [f"no pooling by default: {pooling.unsupported}, which is not supported; encode() asks for pooling"]
    limit = "" if pooling.max_tokens is None else f", at most {pooling.max_tokens} tokens"
    return [f"pooling: {' and '.join(pooling.modes)}{', normalised' if pooling.normalize else ''}{limit}"]
