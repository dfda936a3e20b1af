"""Texts cut to a number of tokens, as transformers cuts them: special tokens stay, and of a pair the longer text goes.

The tokenizer's own settings are not touched, so that it stays safe for several threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adalink.runtime.storage.decoding import decode_json

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as FastTokenizer


@dataclass(frozen=True)
class CutText:
    """Tokens of a text or a pair of texts.

    Attributes:
        ids: token ids, special tokens included.
        types: token type of each.
        offsets: of each token the first character and the one behind the last; ``(0, 0)`` for special tokens.
        words: number of each token's word in its text; ``None`` for special tokens.
        is_cut: whether tokens were left out.
    """

    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int]]
    words: list[int | None]
    is_cut: bool


def encode_cut(
    tokenizer: FastTokenizer, text: str, text_pair: str | None, limit: int | None, *, left: bool = False
) -> CutText:
    """Encode a text, or a pair of texts, cut to ``limit`` tokens; raises what the package tokenizers raises.

    Args:
        tokenizer: without truncation and padding.
        text: the text.
        text_pair: the second text.
        limit: most tokens, special tokens included; ``None`` for no limit.
        left: whether the beginning is cut off, rather than the end.
    """
    whole = tokenizer.encode(text, text_pair)
    if limit is None or len(whole.ids) <= limit:
        return _as_cut(whole, is_cut=False)
    first = tokenizer.encode(text, add_special_tokens=False)
    second = None if text_pair is None else tokenizer.encode(text_pair, add_special_tokens=False)
    room = max(0, limit - tokenizer.num_special_tokens_to_add(second is not None))
    lengths = _shares(len(first.ids), 0 if second is None else len(second.ids), room)
    # Of the uncut text: some post-processors trim offsets, and would trim those of a cut one twice.
    offsets = [pair for pair, special in zip(whole.offsets, whole.special_tokens_mask, strict=True) if not special]
    pieces = [offsets[: len(first.ids)], offsets[len(first.ids) :]]
    kept = [pair for piece, length in zip(pieces, lengths, strict=True) for pair in _cut(piece, length, left=left)]
    first.truncate(lengths[0], direction="left" if left else "right")
    if second is not None:
        second.truncate(lengths[1], direction="left" if left else "right")
    cut = tokenizer.post_process(first, second, add_special_tokens=True)
    remaining = iter(kept)
    places = [(0, 0) if special else next(remaining) for special in cut.special_tokens_mask]
    return replace(_as_cut(cut, is_cut=True), offsets=places)


def _cut(pairs: list[tuple[int, int]], length: int, *, left: bool) -> list[tuple[int, int]]:
    return pairs[len(pairs) - length :] if left else pairs[:length]


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens that each text of a pair keeps: the longer one is cut, then both to halves; the package's own rule."""
    short, long = min(first, second), max(first, second)
    if short + long > room:
        long = short if short > room else max(short, room - short)
        if short + long > room:
            short = room // 2
            long = short + room % 2
    return (long, short) if first > second else (short, long)


def _as_cut(encoding: Encoding, *, is_cut: bool) -> CutText:
    return CutText(list(encoding.ids), list(encoding.type_ids), list(encoding.offsets), list(encoding.word_ids), is_cut)


def lower_cased(tokenizer: FastTokenizer) -> FastTokenizer:
    """A copy that lower-cases texts first, or the same tokenizer if it does so already."""
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Lowercase, Sequence

    settings = decode_json(tokenizer.to_str(), dict[str, Any])["normalizer"] or {}
    if any(step["type"] == "Lowercase" for step in settings.get("normalizers", [settings] if settings else [])):
        return tokenizer
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.normalizer = Sequence([Lowercase(), *([copy.normalizer] if copy.normalizer is not None else [])])
    return copy
