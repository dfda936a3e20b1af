"""Texts of single tokens, for log probabilities and ``/tokenize``."""

from __future__ import annotations

from adalink.runtime.generation.sequence import TokenLogprobs
from adalink.runtime.text.tokenizer import Tokenizer

# What OpenAI's API gives for a token that cannot be.
_LEAST_LOGPROB = -9999.0


class TokenTexts:
    """Text of each token as it reads behind others; remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._specials = {token_id: text for text, token_id in tokenizer.special_ids.items()}
        self._texts: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        """Text of a token, which must be in the vocabulary; part of a character is the replacement character.

        Decoders drop a space at the beginning of a text, so the token is read behind itself.
        """
        text = self._texts.get(token_id)
        if text is None:
            once, twice = self._tokenizer.decode([token_id]), self._tokenizer.decode([token_id, token_id])
            text = self._specials.get(token_id) or (twice[len(once) :] if twice.startswith(once) else once)
            self._texts[token_id] = text
        return text

    def chat_logprobs(self, scores: TokenLogprobs) -> dict[str, object]:
        """An entry of a chat's ``logprobs.content``."""
        top = [self._entry(token, logprob) for token, logprob in scores.top]
        return {**self._entry(scores.token_id, scores.logprob), "top_logprobs": top}

    def top_texts(self, scores: TokenLogprobs) -> dict[str, float]:
        """An entry of a completion's ``top_logprobs``, likeliest first; of two tokens of one text the likelier."""
        texts: dict[str, float] = {}
        for token, logprob in scores.top:
            texts.setdefault(self.text(token), finite(logprob))
        return texts

    def _entry(self, token_id: int, logprob: float) -> dict[str, object]:
        text = self.text(token_id)
        # The bytes of part of a character are not known.
        data = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
        return {"token": text, "logprob": finite(logprob), "bytes": data}


def finite(logprob: float) -> float:
    """A log probability as JSON can hold it."""
    return max(logprob, _LEAST_LOGPROB)
