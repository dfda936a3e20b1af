"""Speculative decoding: prompt lookup drafts tokens from the text itself, and the engine verifies them.

A text that a model continues often repeats itself: names, quotations, code, lists. The draft is what followed the last
few tokens when they stood in the text before (prompt lookup decoding; "Inference with Reference", arXiv 2304.04487).
The engine verifies all draft tokens in one pass, which costs little more than one token where reading the weights takes
the time. A draft token is accepted only if it is the token that would have been chosen anyway. So the text is that of
plain decoding, whatever the sampling, as far as the engine computes the same for several tokens as for one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.engine import InputEmbedder, SpeculativeDecodeState
from adalink.runtime.generation.sequence import SequenceState
from adalink.runtime.tasks.adapter_mapping import AdapterMapping

DRAFT_TOKENS = 8
_LONGEST_MATCH = 3


class PromptLookup:
    """Draft tokens for one row; a token costs the same however long the text is.

    The length of a draft adapts. A draft that is accepted whole doubles it; otherwise it is one more than were
    accepted.

    Args:
        tokens: prompt and what was generated so far.
        max_drafts: draft tokens of a pass at most.
    """

    def __init__(self, tokens: Sequence[int], max_draft_tokens: int) -> None:
        self._max_draft_tokens = max_draft_tokens
        self._length = min(2, max_draft_tokens)
        self._tokens: list[int] = []
        # Where what followed a sequence of tokens stands: its latest occurrence.
        self._following: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Take the next token of the text."""
        position = len(self._tokens)
        for length in range(1, min(_LONGEST_MATCH, position) + 1):
            self._following[tuple(self._tokens[-length:])] = position
        self._tokens.append(token)

    def draft(self, max_tokens: int) -> list[int]:
        """What may follow the last token: ``max_tokens`` at most, none if the last token is new to the text."""
        for length in range(min(_LONGEST_MATCH, len(self._tokens)), 0, -1):
            position = self._following.get(tuple(self._tokens[-length:]))
            if position is not None:
                count = min(self._length, max_tokens)
                # What reaches the end of the text repeats itself, and may go on doing so.
                return list(itertools.islice(itertools.cycle(self._tokens[position : position + count]), count))
        return []

    def update(self, drafted: int, accepted: int) -> None:
        """Adapt the length of drafts to how many of the last ``drafted`` tokens were accepted."""
        if drafted:
            self._length = min(self._max_draft_tokens, 2 * self._length if accepted == drafted else accepted + 1)


def decode_speculatively(
    state: SpeculativeDecodeState,
    embedder: InputEmbedder,
    tasks: AdapterMapping,
    row: SequenceState,
    choose: Callable[[Array], int],
    tokens_left: int,
    draft_tokens: int,
) -> None:
    """Speculative decoding of the only row until it has ended, or has ``tokens_left`` more tokens.

    Prompt lookup drafts tokens, and one pass verifies them. What is chosen, and with which random numbers, is what
    steps of one token would choose.
    """
    lookup = PromptLookup((*row.prompt, *row.token_ids), draft_tokens)
    logits, draft = state.logits, list[int]()
    while True:
        for accepted, scores in enumerate(logits):
            token = choose(scores)
            row.push(token)
            tokens_left -= 1
            if row.finish_reason is not None or not tokens_left:
                return
            lookup.push(token)
            if accepted == len(draft) or token != draft[accepted]:
                break
        state.rollback(len(draft) - accepted)
        lookup.update(len(draft), accepted)
        draft = lookup.draft(tokens_left - 1)
        logits = state.verify(embedder.lookup(np.array([[token, *draft]]), tasks))
