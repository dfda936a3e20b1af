"""Tokens as grammars see them: the bytes of each, from the deployment's tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adalink.runtime.errors import BackendError, BackendUnavailableError, RequestError
from adalink.runtime.extras import install_command
from adalink.runtime.storage.manifest import Base
from adalink.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Letters, digits, punctuation, white space, and characters of several bytes.
_PROBE = '{"Name": [1, -2.5, true], "é": "日本 🙂"}'


def make_tokens(tokenizer: Tokenizer, base: Base) -> LLTokenizer:
    """The base's tokens for llguidance, which takes some tenths of a second.

    Raises:
        BackendUnavailableError: llguidance is not installed.
        RequestError: the base has no end token.
        BackendError: llguidance sees other texts in the tokens than the tokenizer.
    """
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError as error:
        raise BackendUnavailableError(
            f"structured output needs llguidance, which is not installed: {install_command('structured')}"
        ) from error
    ends = list(base.eos_token_ids)
    if not ends or max(ends) >= base.vocab_size:
        raise RequestError(
            f"{base.name} has end tokens {ends}, expected some in its vocabulary: nothing else ends JSON"
        )
    size = max(base.vocab_size, tokenizer.vocab_size)
    try:
        tokens = LLTokenizer(tokenizer.to_json(), n_vocab=size, eos_token=ends)
    except ValueError:  # neither of the decoders that it knows, those of bytes and of byte fallback
        tokens = LLTokenizer(TokenizerWrapper(_Table(tokenizer, size, ends[0])), eos_token=ends)
    _check(tokens, tokenizer, size)
    return tokens


def stripped_tokens(tokens: LLTokenizer, tokenizer: Tokenizer) -> list[int]:
    """Tokens that lose their white space where they begin a text, as with SentencePiece's."""
    spaced = [token for token in range(tokenizer.vocab_size) if tokens.decode_bytes([token])[:1] == b" "]
    texts = tokenizer.decode_batch([[token] for token in spaced])
    return [token for token, text in zip(spaced, texts, strict=True) if not text.startswith(" ")]


class _Table:
    """The bytes of each token, as llguidance's ``TokenizerWrapper`` takes them: what it adds to a text before it."""

    def __init__(self, tokenizer: Tokenizer, size: int, end: int) -> None:
        special = {token: text for text, token in tokenizer.special_ids.items()}
        plain = [token for token in range(tokenizer.vocab_size) if token not in special]
        texts = tokenizer.decode_batch([[token] for token in plain])
        anchor, before = next((token, text) for token, text in zip(plain, texts, strict=True) if text.strip())
        behind = tokenizer.decode_batch([[anchor, token] for token in plain])
        pieces = {
            token: text[len(before) :]
            for token, text in zip(plain, behind, strict=True)
            if text.startswith(before) and "\N{REPLACEMENT CHARACTER}" not in text
        }
        self.eos_token_id = end
        self.bos_token_id = None
        self.special_token_ids = sorted(special)
        self.tokens = [(special.get(token) or pieces.get(token, "")).encode() for token in range(size)]
        self._ids = {text: token for token, text in reversed(list(enumerate(self.tokens))) if text}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of a text that must follow: the longest first, since the tokenizer's own would begin a word."""
        data, ids, at = text if isinstance(text, bytes) else text.encode(), [], 0
        while at < len(data):
            sizes = range(min(self._longest, len(data) - at), 0, -1)
            size = next((size for size in sizes if data[at : at + size] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[data[at : at + size]])
            at += size
        return ids


def _check(tokens: LLTokenizer, tokenizer: Tokenizer, size: int) -> None:
    """Compare llguidance's texts of tokens with the tokenizer's."""
    ids = tokenizer.encode_plain(_PROBE)
    text = tokenizer.decode(ids)
    seen = tokens.decode_str([token for token in ids if token not in tokenizer.special_ids.values()])
    if tokens.vocab_size != size or seen.strip() != text.strip():
        raise BackendError(
            f"llguidance reads the tokenizer as {tokens.vocab_size} tokens and {seen!r}, expected {size} and {text!r}: "
            "structured output is not available with it"
        )
