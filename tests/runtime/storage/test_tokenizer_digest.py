"""Digest of a tokenizer: the same for what gives the same tokens, whoever wrote it, and another for any change."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest

from adalink.runtime.errors import IntegrityError
from adalink.runtime.storage.tokenizer_digest import tokenizer_digest

TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": 0, "content": "<s>", "special": True, "lstrip": False}],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "model": {
        "type": "BPE",
        "dropout": None,
        "ignore_merges": False,
        "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3},
        "merges": [["a", "b"], ["ab", "a"]],
    },
}


# Of this very file: it is stored in adapters, so it must not change from release to release.
PINNED = "sha256:2d2faa40ea281b75efdb8593d23571d6823ff80a43e8ab21490ddf07405932a0"


def digest(**model: Any) -> str:
    content = copy.deepcopy(TOKENIZER)
    content["model"] |= model
    return tokenizer_digest(msgspec.json.encode(content))


def test_is_pinned() -> None:
    assert digest() == PINNED


def without_ignore_merges(content: dict[str, Any]) -> None:
    del content["model"]["ignore_merges"]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"].update(merges=["a b", "ab a"]),  # tokenizers before 0.20
        without_ignore_merges,  # a release that does not know it
        lambda content: content.update(padding={"length": 8}, truncation={"max_length": 8}, version="2.0"),
        lambda content: content["model"].update(new_setting=None, another=False, third=[]),
        lambda content: content["model"].update(vocab=dict(reversed(content["model"]["vocab"].items()))),
    ],
    ids=["merges", "missing", "padding", "new-settings", "order"],
)
def test_same_whoever_wrote_it(change: Any) -> None:
    content = copy.deepcopy(TOKENIZER)
    change(content)
    assert tokenizer_digest(msgspec.json.encode(content).decode()) == PINNED


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["pre_tokenizer"].update(use_regex=False),
        lambda content: content.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [content["pre_tokenizer"]]}),
        lambda content: content["model"].update(ignore_merges=True),
        lambda content: content["model"].update(merges=[["ab", "a"], ["a", "b"]]),
        lambda content: content["model"]["vocab"].update(a=2, b=1),
        lambda content: content["added_tokens"][0].update(lstrip=True),
        lambda content: content["added_tokens"][0].update(id=1),
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content.update(post_processor={"type": "TemplateProcessing"}),
    ],
)
def test_planted_change_is_another(change: Any) -> None:
    content = copy.deepcopy(TOKENIZER)
    change(content)
    assert tokenizer_digest(msgspec.json.encode(content)) != PINNED


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_refuses_other_files(content: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"tokenizer.json: .*; export the base again"):
        tokenizer_digest(content)
