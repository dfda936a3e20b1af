"""Sequence state: tokens, text and end of one generated sequence, and the resulting ``Generation``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from adalink.runtime.generation.stop_texts import StopTexts, without_marks
from adalink.runtime.text.tokenizer import TextStream, Tokenizer

Stream = Callable[[int, str], None]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one generated token, natural logarithms of the model's own distribution.

    Attributes:
        token_id: the generated token.
        logprob: its log probability.
        top: token ids and log probabilities of the likeliest tokens, in falling order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Generation:
    """Result for one prompt.

    Attributes:
        text: the generated text, without the prompt.
        token_ids: its tokens, without the end token; tokens of a stop text are included, although the text omits it.
        finish_reason: ``"stop"`` for an end token or stop text, ``"length"`` at ``max_new_tokens``, ``"cancelled"``.
        prompt_tokens: number of tokens of the prompt.
        logprobs: log probabilities at each of ``token_ids``; empty if the request did not ask for them.
        cached_tokens: positions of the prompt that came from the prefix cache; not compared.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = field(default=0, compare=False)


class SequenceState:
    """One row of a batch: collects tokens, decodes text, detects the end."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        tokenizer: Tokenizer,
        stops: StopTexts | Sequence[str],
        eos: frozenset[int],
        stream: Stream | None,
    ) -> None:
        self.prompt = prompt
        self._index = index
        self._text = TextStream(tokenizer)
        stops = stops if isinstance(stops, StopTexts) else StopTexts(tuple(stops))
        self._stops, self._heads, self._marks = stops.texts, stops.heads, stops.marks
        # The text with a mark for each special token of a stop text; all positions count in it.
        self._searched = ""
        self._eos = eos
        self._stream = stream
        self._sent = 0
        self._end: int | None = None
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None

    def push(self, token_id: int) -> None:
        """Append the next token; the row must not have finished."""
        if token_id in self._eos:
            self._searched += self._text.finish() + self._marks.get(token_id, "")
            self._find_stop()
            self.finish_reason = "stop"
        else:
            self.token_ids.append(token_id)
            piece = self._text.push(token_id) + self._marks.get(token_id, "")
            if piece:
                self._searched += piece
                self._find_stop()
        self._send()

    def cancel(self) -> None:
        """End the row here; text that may begin a stop text is kept."""
        if self.finish_reason is None:
            self._searched += self._text.finish()
            self.finish_reason = "cancelled"
            self._send()

    def finish(self, logprobs: Sequence[TokenLogprobs] = (), cached_tokens: int = 0) -> Generation:
        """The result; a row without an end stopped at ``max_new_tokens``.

        Args:
            logprobs: at each chosen token; those of an end token are left out.
            cached_tokens: positions of the prompt that came from the prefix cache.
        """
        if self.finish_reason is None:
            self._searched += self._text.finish()
            self._find_stop()
            self.finish_reason = self.finish_reason or "length"
            self._send()
        text = without_marks(self._searched[: self._end])
        tokens = tuple(self.token_ids)
        return Generation(
            text, tokens, self.finish_reason, len(self.prompt), tuple(logprobs[: len(tokens)]), cached_tokens
        )

    def _find_stop(self) -> None:
        """Search the text not yet streamed for a stop text; streamed text never begins one."""
        starts = [start for stop in self._stops if (start := self._searched.find(stop, self._sent)) >= 0]
        if self._sent == 0 and any(self._searched.startswith(head) for head in self._heads):
            starts = [0]
        if starts:
            self._end = min(starts)
            self.finish_reason = "stop"

    def _send(self) -> None:
        """Stream the settled text, except an ending that may begin a stop text."""
        text = self._searched
        end = len(text) if self._end is None else self._end
        if self.finish_reason is None:
            end -= max((_overlap(text, stop) for stop in self._stops), default=0)
            if any(head.startswith(text) for head in self._heads):
                end = 0
        if end > self._sent:
            if self._stream is not None and (piece := without_marks(text[self._sent : end])):
                self._stream(self._index, piece)
            self._sent = end


def stops_behind(prompt: Sequence[int], tokenizer: Tokenizer, stops: StopTexts) -> StopTexts:
    """Stop texts of a row, of which some may begin in its prompt."""
    longest = max(map(len, stops.texts), default=0)
    if not longest:
        return stops
    text, tail = TextStream(tokenizer), ""
    others = set(tokenizer.special_ids.values()) - stops.marks.keys()
    for token in prompt[-4 * longest :]:  # no token is shorter than a byte; a character has at most four
        piece = text.push(token)
        tail = "" if token in others else tail + piece + stops.marks.get(token, "")
    return stops.behind(tail + text.finish())


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
