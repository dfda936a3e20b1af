"""Answers in the form of OpenAI's API, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from adalink.runtime.generation.handle import TextPiece
from adalink.runtime.generation.sequence import Generation, TokenLogprobs
from adalink.serving.token_texts import TokenTexts, finite


class AnswerForm(Protocol):
    """Form of the answers of one endpoint."""

    def whole(self, results: Sequence[Generation]) -> dict[str, Any]:
        """The whole answer."""
        ...

    def begin(self, index: int) -> dict[str, Any] | None:
        """The chunk before a choice's first text, if there is one."""
        ...

    def chunk(self, index: int, piece: TextPiece) -> dict[str, Any] | None:
        """The chunk of a piece; ``None`` if it tells the client nothing."""
        ...

    def end(self, index: int, result: Generation) -> dict[str, Any]:
        """The chunk that says why a choice has ended."""
        ...

    def usage(self, results: Sequence[Generation]) -> dict[str, Any]:
        """The chunk that counts tokens."""
        ...


class _Form:
    """What both forms share.

    ``texts`` gives texts of tokens where log probabilities were asked for, ``choices`` is their number a prompt.
    """

    prefix, whole_kind, chunk_kind = "", "", ""

    def __init__(self, model: str, choices: int, texts: TokenTexts | None, *, has_usage: bool) -> None:
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._choices, self._texts, self._has_usage = choices, texts, has_usage

    def usage(self, results: Sequence[Generation]) -> dict[str, Any]:
        """See ``AnswerForm.usage``."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": self._count(results)}

    def _answer(self, choices: list[dict[str, Any]], results: Sequence[Generation]) -> dict[str, Any]:
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": self._count(results)}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_kind, "choices": [choice]}
        return {**chunk, "usage": None} if self._has_usage else chunk

    def _count(self, results: Sequence[Generation]) -> dict[str, Any]:
        """Tokens of all prompts, each once, and of all choices."""
        firsts = results[:: self._choices]
        prompt, generated = (
            sum(result.prompt_tokens for result in firsts),
            sum(len(result.token_ids) for result in results),
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(result.cached_tokens for result in firsts)},
        }


class ChatForm(_Form):
    """Form of ``/v1/chat/completions``."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, results: Sequence[Generation]) -> dict[str, Any]:
        """See ``AnswerForm.whole``."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": self._logprobs(result.logprobs),
                "finish_reason": result.finish_reason,
            }
            for index, result in enumerate(results)
        ]
        return self._answer(choices, results)

    def begin(self, index: int) -> dict[str, Any] | None:
        """See ``AnswerForm.begin``."""
        return self._chunk(_choice(index, delta={"role": "assistant", "content": ""}))

    def chunk(self, index: int, piece: TextPiece) -> dict[str, Any] | None:
        """See ``AnswerForm.chunk``."""
        if not piece.text and not piece.logprobs:
            return None
        return self._chunk(_choice(index, self._logprobs(piece.logprobs), delta={"content": piece.text}))

    def end(self, index: int, result: Generation) -> dict[str, Any]:
        """See ``AnswerForm.end``."""
        return self._chunk(_choice(index, reason=result.finish_reason, delta={}))

    def _logprobs(self, scores: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self._texts is None:
            return None
        return {"content": [self._texts.chat_logprobs(entry) for entry in scores], "refusal": None}


class CompletionForm(_Form):
    """Form of ``/v1/completions``."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, choices: int, texts: TokenTexts | None, *, has_usage: bool) -> None:
        super().__init__(model, choices, texts, has_usage=has_usage)
        self._offsets: dict[int, int] = {}

    def whole(self, results: Sequence[Generation]) -> dict[str, Any]:
        """See ``AnswerForm.whole``."""
        choices = [
            _choice(index, self._logprobs(index, result.logprobs), result.finish_reason, text=result.text)
            for index, result in enumerate(results)
        ]
        return self._answer(choices, results)

    def begin(self, index: int) -> dict[str, Any] | None:
        """See ``AnswerForm.begin``."""
        return None

    def chunk(self, index: int, piece: TextPiece) -> dict[str, Any] | None:
        """See ``AnswerForm.chunk``."""
        if not piece.text and not piece.logprobs:
            return None
        return self._chunk(_choice(index, self._logprobs(index, piece.logprobs), text=piece.text))

    def end(self, index: int, result: Generation) -> dict[str, Any]:
        """See ``AnswerForm.end``."""
        return self._chunk(_choice(index, reason=result.finish_reason, text=""))

    def _logprobs(self, index: int, scores: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self._texts is None:
            return None
        tokens = [self._texts.text(entry.token_id) for entry in scores]
        offsets, at = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self._offsets[index] = at
        return {
            "tokens": tokens,
            "token_logprobs": [finite(entry.logprob) for entry in scores],
            "top_logprobs": [self._texts.top_texts(entry) for entry in scores],
            "text_offset": offsets,
        }


def _choice(
    index: int, logprobs: dict[str, Any] | None = None, reason: str | None = None, **content: Any
) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
