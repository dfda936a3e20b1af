"""Spans of a text from the tags of its tokens (BIO): where each begins and ends, in characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from adalink.runtime.arrays import Array
from adalink.runtime.storage.head_spec import OUTSIDE

# Thai, Lao, Burmese, Khmer, Japanese and Chinese: tokenizers take a whole sentence for a word.
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Span:
    """A part of a text.

    Attributes:
        label: its kind.
        start: its first character.
        end: the character behind its last.
        text: the characters.
        probability: mean probability of the tags of its tokens.
    """

    label: str
    start: int
    end: int
    text: str
    probability: float


def read_spans(
    text: str, offsets: Sequence[tuple[int, int]], words: Sequence[int | None], labels: Sequence[str], scores: Array
) -> tuple[Span, ...]:
    """Spans of a text, in order.

    A word has the tag of its first token that is not white space; in scripts without spaces between words each token
    has its own. ``I`` goes on with a span of its kind, and begins one where there is none.

    Args:
        text: the text.
        offsets: of each token the first character and the one behind the last.
        words: number of each token's word; ``None`` for special tokens, which have no tag.
        labels: the tags.
        scores: probability of each tag, ``(tokens, tags)``.
    """
    spans: list[Span] = []
    opened: list[tuple[int, int, float]] = []
    kind, last_word, tag, share = "", None, OUTSIDE, 0.0

    def close() -> None:
        if opened:
            start, end = opened[0][0], max(part[1] for part in opened)
            probability = sum(part[2] for part in opened) / len(opened)
            spans.append(Span(kind, start, end, text[start:end], probability))
            opened.clear()

    for position, ((start, end), word) in enumerate(zip(offsets, words, strict=True)):
        start += len(text[start:end]) - len(text[start:end].lstrip())  # some tokenizers count the space before
        if word is None or start >= end:
            continue
        if word != last_word or _WITHOUT_SPACES.match(text[start]):
            best = int(scores[position].argmax())
            tag, share = labels[best], float(scores[position, best])
            if tag == OUTSIDE or tag.startswith("B-") or tag[2:] != kind:
                close()
            last_word = word
        if tag != OUTSIDE:
            kind = tag[2:]
            opened.append((start, end, share))
    close()
    return tuple(spans)
