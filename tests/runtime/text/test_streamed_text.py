"""Text as it is streamed: whole characters, and nothing of a stop text."""

from __future__ import annotations

import pytest

from adalink.runtime.generation.sequence import SequenceState
from adalink.runtime.text.tokenizer import TextStream


class Bytes:
    """A byte-level tokenizer: a token is one byte, so characters arrive in pieces."""

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["naïve café", "日本語 text", "👩‍🚀 ok", "plain"])
def test_characters_made_of_several_tokens_come_whole(text: str) -> None:
    stream = TextStream(Bytes())  # type: ignore[arg-type]
    pieces = [stream.push(token) for token in text.encode()]
    assert "".join(pieces) + stream.finish() == text == stream.text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


class Fallback:
    """A tokenizer's own decoder of bytes, which takes all that follow each other as one text."""

    def decode(self, token_ids: list[int]) -> str:
        from tokenizers import decoders

        own = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        return str(own.decode([f"<0x{token:02X}>" if token > 127 else chr(token) for token in token_ids]))


@pytest.mark.parametrize(
    ("data", "pieces", "rest"),
    [
        ("a😀".encode() + "😁".encode()[:2], ["a", "😀"], "��"),
        ("a😀".encode() + "😁".encode()[:2] + b"b", ["a", "😀", "��b"], ""),
        ("é日😀".encode(), ["é", "日", "😀"], ""),
        (b"\xf0\x9f", [], "��"),
    ],
)
def test_a_character_cut_off_spoils_none_before_it(data: bytes, pieces: list[str], rest: str) -> None:
    stream = TextStream(Fallback())  # type: ignore[arg-type]
    assert [piece for token in data if (piece := stream.push(token))] == pieces
    assert stream.finish() == rest
    assert stream.text == "".join(pieces) + rest


def test_a_stop_text_across_pieces_is_held_back() -> None:
    sent: list[str] = []
    row = SequenceState(0, (1,), Bytes(), ("END",), frozenset({0}), lambda _, piece: sent.append(piece))  # type: ignore[arg-type]
    for token in b"aENxEE":
        row.push(token)
    assert "".join(sent) == "aENxE"
    for token in b"ND":
        row.push(token)
    assert row.finish_reason == "stop"
    result = row.finish()
    assert result.text == "aENxE" == "".join(sent)


def test_a_row_that_ends_gives_up_what_it_held_back() -> None:
    sent: list[str] = []
    row = SequenceState(0, (1,), Bytes(), ("END",), frozenset({0}), lambda _, piece: sent.append(piece))  # type: ignore[arg-type]
    for token in [*b"aEN", 0]:
        row.push(token)
    assert row.finish().text == "aEN" == "".join(sent)


class Pieces:
    """A tokenizer of pieces; bytes that are no whole character are replacement characters."""

    pieces = (b"", b"xabcd", b"e", b"ab", b"c\xf0\x9f")

    def decode(self, token_ids: list[int]) -> str:
        return b"".join(self.pieces[token] for token in token_ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("tokens", "stops", "text"),
    [
        ([1, 2], ("cd", "b"), "xa"),  # of two in one piece the one that begins first
        ([1, 2], ("d", "abcd"), "x"),  # and where both end at once
        ([3, 4, 0], ("bc",), "a"),  # what only the end token settles
        ([3, 4], ("bc",), "a"),  # or the budget
    ],
)
def test_stop_texts_of_which_a_piece_holds_several_or_the_end_the_only_one(
    tokens: list[int], stops: tuple[str, ...], text: str
) -> None:
    sent: list[str] = []
    row = SequenceState(0, (1,), Pieces(), stops, frozenset({0}), lambda _, piece: sent.append(piece))  # type: ignore[arg-type]
    for token in tokens:
        if row.finish_reason is None:
            row.push(token)
    result = row.finish()
    assert (result.text, "".join(sent), result.finish_reason) == (text, text, "stop")
