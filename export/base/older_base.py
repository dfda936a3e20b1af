"""Another variant for a base that an older kit described: what its manifest lacks, and what of that is taken up."""

from __future__ import annotations

import msgspec

from adalink.runtime.storage.manifest import Base


def take_up(base: Base, described: Base) -> Base:
    """The base of a deployment with facts that change no result: tensors left out, the tokenizer's digest, pooling.

    Args:
        base: the base of the deployment, whose tokenizer is that of the model.
        described: the base as this kit describes the model.
    """
    if base.weights_digest != described.weights_digest:  # an older one that is empty: known by its embeddings alone
        return base
    digest = base.tokenizer_digest
    if base.tokenizer is not None and not digest:
        digest = described.tokenizer_digest
    return msgspec.structs.replace(
        base,
        unused_tensors=base.unused_tensors or described.unused_tensors,
        tokenizer_digest=digest,
        pooling=base.pooling or described.pooling,
    )


def name_missing(base: Base, described: Base) -> list[str]:
    """Lines for the user: facts of the model that would change results, so that the deployment goes on without them."""
    missing = []
    if base.generation is None and described.generation is not None:
        missing.append("generation defaults")
    if base.special_tokens is None and described.special_tokens:
        missing.append("special tokens: chat templates get those of the model's ids")
    if base.token_types is None and described.takes_token_types:
        missing.append("token types: it refuses pairs of texts")
    return [
        f"the base is of an older kit without {fact}, and stays so; export into another folder to have them"
        for fact in missing
    ]
