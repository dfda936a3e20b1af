"""Texts cut without touching the tokenizer's settings, against the package's own truncation."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from helpers.tiny_tokenizer import make_pair_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adalink.runtime.text.truncation import encode_cut, lower_cased

WORDS = ["a", "oil", "prices", "Straße", "São", "1,000", "x y", "  ", "naïve", "."]


def bert() -> Tokenizer:
    return make_pair_tokenizer().backend_tokenizer


def roberta() -> Tokenizer:
    letters = pre_tokenizers.ByteLevel.alphabet()
    merges = [("o", "i"), ("oi", "l"), ("Ġ", "oil"), ("Ġ", "p"), ("Ġp", "r"), ("Ġ", "Ġ")]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(letters), *("".join(merge) for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5's and XLM-R's: a space belongs to the word behind it, and texts end with one special token."""
    letters = sorted({letter for word in WORDS for letter in word} | {"▁"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def bare() -> Tokenizer:
    """Without special tokens."""
    tokenizer = roberta()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def characters(offsets: list[tuple[int, int]], *, left: bool) -> list[Any]:
    """Where tokens are, apart from those without characters; of a text cut on the left where they end.

    The package counts the space before its new first token then.
    """
    return [None if start >= end else end if left else (start, end) for start, end in offsets]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("make", [bert, roberta, metaspace, bare])
def test_tokens_are_those_of_the_package(make: Callable[[], Tokenizer], left: bool) -> None:
    tokenizer, other = make(), make()
    draw = random.Random(7)
    cut = 0
    for _ in range(300):
        first, second = (" ".join(draw.choices(WORDS, k=draw.randint(0, 6))) for _ in range(2))
        pair = second if draw.random() < 0.5 else None
        limit = draw.randint(other.num_special_tokens_to_add(pair is not None), 30)
        other.enable_truncation(limit, strategy="longest_first", direction="left" if left else "right")
        wanted = other.encode(first, pair)
        got = encode_cut(tokenizer, first, pair, limit, left=left)
        assert got.ids == wanted.ids
        assert got.types == wanted.type_ids
        assert characters(got.offsets, left=left) == characters(wanted.offsets, left=left)
        assert got.words == wanted.word_ids
        other.no_truncation()
        assert got.is_cut == (len(other.encode(first, pair).ids) > limit)
        cut += got.is_cut
    assert 50 < cut < 290
    assert tokenizer.truncation is None


@pytest.mark.parametrize("limit", [0, 1])
def test_a_limit_below_the_special_tokens_leaves_them(limit: int) -> None:
    assert encode_cut(bert(), "oil", None, limit).ids == encode_cut(bert(), "", None, None).ids


def test_transformers_cuts_the_same() -> None:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=roberta(), pad_token="<pad>")
    for limit in (6, 9, 12):
        encoded = wrapped("prices of oil", "naïve São", truncation=True, max_length=limit)
        assert encode_cut(roberta(), "prices of oil", "naïve São", limit).ids == encoded["input_ids"]


def test_lower_case_once() -> None:
    tokenizer = roberta()
    lowered = lower_cased(tokenizer)
    assert lowered.encode("ÄB").ids == tokenizer.encode("äb").ids != tokenizer.encode("ÄB").ids
    assert lower_cased(lowered) is lowered
    twice = metaspace()
    twice.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    assert lower_cased(twice) is twice
