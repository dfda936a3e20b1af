"""Drafts from the text itself: what followed the last tokens when they stood there before.

A text that a model continues often repeats itself: names, quotations, code, lists. So what followed the last few
tokens earlier is a fair guess at what follows now (prompt lookup decoding; "Inference with Reference", arXiv
2304.04487). The engine checks all guesses in one pass, which costs little more than one token where reading the weights
is what takes the time. A guess stands only if it is the token that would have been chosen anyway: the text is that of
decoding without drafts, whatever the sampling, as far as the engine computes the same for several tokens as for one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

DRAFT_TOKENS = 8
_LONGEST_MATCH = 3


class PromptLookup:
    """Guesses for one row; a token costs the same however long the text is.

    The number of guesses follows their luck: all of them right doubles it, otherwise it is one more than were right.

    Args:
        tokens: prompt and what was generated so far.
        most: guesses at once at most.
    """

    def __init__(self, tokens: Sequence[int], most: int) -> None:
        self._most = most
        self._hope = min(2, most)
        self._tokens: list[int] = []
        # Where what followed a sequence of tokens stands: its latest occurrence.
        self._following: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Take the next token of the text."""
        place = len(self._tokens)
        for length in range(1, min(_LONGEST_MATCH, place) + 1):
            self._following[tuple(self._tokens[-length:])] = place
        self._tokens.append(token)

    def guess(self, room: int) -> list[int]:
        """What may follow the last token: ``room`` tokens at most, none if the last token is new to the text."""
        for length in range(min(_LONGEST_MATCH, len(self._tokens)), 0, -1):
            place = self._following.get(tuple(self._tokens[-length:]))
            if place is not None:
                count = min(self._hope, room)
                # What reaches the end of the text repeats itself, and may go on doing so.
                return list(itertools.islice(itertools.cycle(self._tokens[place : place + count]), count))
        return []

    def learn(self, guessed: int, right: int) -> None:
        """Take note of how many guesses there were, and how many of them, from the first on, were right."""
        if guessed:
            self._hope = min(self._most, 2 * self._hope if right == guessed else right + 1)
