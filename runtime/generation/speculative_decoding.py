"""Speculative decoding: prompt lookup drafts tokens from the text itself, and the engine verifies them.

Texts repeat themselves: names, quotations, code, lists. The draft is the continuation of the last few tokens at their
previous occurrence (prompt lookup decoding; "Inference with Reference", arXiv 2304.04487). The engine verifies all
draft tokens in one pass. That costs little more than one token where reading the weights dominates. A draft token is
accepted only if sampling chooses the same token. The text is therefore that of ordinary decoding, as far as the engine
computes the same for several tokens as for one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from adalink.runtime.arguments import check_whole
from adalink.runtime.storage.manifest import Base, Variant

DRAFT_TOKENS = 8
_LONGEST_MATCH = 3


def draft_limit(draft_tokens: int | None, base: Base, variant: Variant, kv_cache_dtype: str | None = None) -> int:
    """Most draft tokens of a pass.

    By default ``DRAFT_TOKENS`` where the engine computes in float32 throughout, as a pass over several tokens then
    rounds as steps do; else 0.

    Raises:
        RequestError: ``draft_tokens`` is no whole number.
    """
    if draft_tokens is None:
        is_exact = base.embedding_dtype == "float32" and variant.quantization is None
        return DRAFT_TOKENS if is_exact and kv_cache_dtype in (None, "float32") else 0
    check_whole(draft_tokens, "draft_tokens", 0)
    return draft_tokens


class PromptLookup:
    """Draft tokens for one row, in time that does not depend on the length of the text.

    The draft length adapts: it doubles after a fully accepted draft, and is otherwise one more than the number of
    accepted tokens.

    Args:
        tokens: the prompt and the tokens generated so far.
        max_draft_tokens: most draft tokens of a pass.
    """

    def __init__(self, tokens: Sequence[int], max_draft_tokens: int) -> None:
        self._max_draft_tokens = max_draft_tokens
        self._length = min(2, max_draft_tokens)
        self._tokens: list[int] = []
        # Position after the latest occurrence of each n-gram.
        self._following: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Append the next token of the text."""
        position = len(self._tokens)
        for length in range(1, min(_LONGEST_MATCH, position) + 1):
            self._following[tuple(self._tokens[-length:])] = position
        self._tokens.append(token)

    def draft(self, max_tokens: int) -> list[int]:
        """Draft of at most ``max_tokens`` tokens; empty if the last token is new to the text."""
        for length in range(min(_LONGEST_MATCH, len(self._tokens)), 0, -1):
            position = self._following.get(tuple(self._tokens[-length:]))
            if position is not None:
                count = min(self._length, max_tokens)
                # A match that reaches the end of the text is a repetition; continue it.
                return list(itertools.islice(itertools.cycle(self._tokens[position : position + count]), count))
        return []

    def update(self, drafted: int, accepted: int) -> None:
        """Adapt the draft length: ``accepted`` of the last ``drafted`` tokens were right."""
        if drafted:
            self._length = min(self._max_draft_tokens, 2 * self._length if accepted == drafted else accepted + 1)
