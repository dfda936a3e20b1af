"""Failures of the package tokenizers, panics of its Rust code included, are errors of the kit."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from helpers.tiny_tokenizer import make_tokenizer

from adalink.runtime import Deployment
from adalink.runtime.errors import IntegrityError, RequestError
from adalink.runtime.text.fast_tokenizer import tokenizer_errors
from adalink.runtime.text.tokenizer import Tokenizer


def make_broken(deployment: Deployment, **changes: Any) -> Tokenizer:
    content = json.loads(make_tokenizer().backend_tokenizer.to_str()) | changes
    return Tokenizer(json.dumps(content).encode(), "{{ messages[0].content }}", deployment.manifest.base)


def test_a_panic_while_reading(deployment: Deployment) -> None:
    with pytest.raises(IntegrityError, match=r"tokenizer.json is not a tokenizer.json.*failed inside: "):
        make_broken(deployment, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})


def test_a_panic_while_encoding(deployment: Deployment) -> None:
    own = make_broken(deployment, pre_tokenizer={"type": "FixedLength", "length": 0})
    for encode in (own.encode, own.encode_chat, lambda text: own.encode_messages([{"role": "user", "content": text}])):
        with pytest.raises(
            RequestError, match=r"tokenizer.json cannot encode this text of 2 characters.*failed inside"
        ):
            encode("ab")


def test_a_panic_while_decoding(deployment: Deployment) -> None:
    own = make_broken(deployment, decoder={"type": "Strip", "content": "a", "start": 5, "stop": 5})
    with pytest.raises(IntegrityError, match=r"tokenizer.json cannot decode tokens.*failed inside"):
        own.decode([69])


def test_other_exceptions_that_are_no_errors_pass() -> None:
    with pytest.raises(KeyboardInterrupt), tokenizer_errors(RequestError, "tokenizer.json"):
        raise KeyboardInterrupt
    with pytest.raises(RequestError, match=r"^tokenizer\.json: no$"), tokenizer_errors(RequestError, "tokenizer.json"):
        raise TypeError("no")


def test_prompts_with_half_a_character(deployment: Deployment) -> None:
    for arguments in (
        {"prompts": ["a\ud800"]},
        {"prompts": ["a\ud800"], "chat": True},
        {"prompts": ["a"], "stop": "\ud800"},
    ):
        with pytest.raises(RequestError, match=r"holds '\\ud800' at character"):
            deployment.generate(**arguments)


def test_special_tokens_are_those_that_decoding_leaves_out(deployment: Deployment) -> None:
    ids = deployment.tokenizer.special_ids
    assert ids["<bos>"] == 1
    assert all(deployment.tokenizer.decode([token]) == "" for token in ids.values())
    assert msgspec.json.encode(ids)
