"""Unigram tokenizer of a GGUF file, as T5 has it: transformers drops the file's normalisation and takes T5's flags."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNIGRAM = "t5"
CHARSMAP = "ggml.precompiled_charsmap"
_BYTE = 6
# What transformers builds whatever the file says; for flags that are not in it llama.cpp takes the same.
_EXPECTED: dict[str, Any] = {
    "ggml.unknown_token_id": 2,
    "ggml.add_bos_token": False,
    "ggml.add_eos_token": True,
}
# These must be said: T5 splits texts at white space, and each word begins with the mark of one.
_REQUIRED = {"ggml.add_space_prefix": True, "ggml.remove_extra_whitespaces": True}
UNIGRAM_KEYS = (CHARSMAP, *_EXPECTED, *_REQUIRED)
_END = "</s>"


def repair_unigram(file: str, metadata: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the normalisation of the file, in place.

    Args:
        file: the file's name, for messages.
        metadata: the file's keys, with the arrays of tokens, their kinds and ``CHARSMAP`` in full.
        tokenizer: what transformers made of the file.

    Raises:
        ModelError: the file asks for what transformers does not build, such as tokens of bytes.
    """
    from tokenizers import normalizers

    for name, expected in (_EXPECTED | _REQUIRED).items():
        value = metadata.get(f"tokenizer.{name}", None if name in _REQUIRED else expected)
        if value != expected:
            raise _refusal(file, f"its metadata key tokenizer.{name} is {value}, expected {expected}")
    if _BYTE in (metadata.get("tokenizer.ggml.token_type") or ()):
        raise _refusal(file, "it has tokens of single bytes, expected none")
    tokens = metadata["tokenizer.ggml.tokens"]
    end = metadata.get("tokenizer.ggml.eos_token_id", 1)
    if not 0 <= end < len(tokens) or tokens[end] != _END:
        raise _refusal(file, f"its end token is {end}, expected the one of the text {_END!r}")
    if (charsmap := metadata.get(f"tokenizer.{CHARSMAP}")) is None:
        return
    try:
        tokenizer.backend_tokenizer.normalizer = normalizers.Precompiled(bytes(charsmap))
    except Exception as error:
        raise _refusal(file, f"its metadata key tokenizer.{CHARSMAP} cannot be read: {error}") from error


def _refusal(file: str, reason: str) -> ModelError:
    return ModelError(
        f"base model {file}: {reason}, and texts get other tokens than it says: export the original checkpoint instead"
    )
