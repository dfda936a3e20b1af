"""The decode loop: a batch of prompts, each row with its own task, in front of one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.engine import DecodeState, InputEmbedder, SpeculativeDecodeState
from adalink.runtime.errors import RequestError
from adalink.runtime.generation.prompt_lookup import PromptLookup
from adalink.runtime.generation.sampling import Sampling
from adalink.runtime.tasks.adapter_mapping import AdapterMapping
from adalink.runtime.text.tokenizer import TextStream, Tokenizer

Stream = Callable[[int, str], None]


@dataclass(frozen=True)
class Generation:
    """What one prompt became.

    Attributes:
        text: the generated text, without the prompt.
        token_ids: its tokens, without an end token; those of a stop text, which the text leaves out, are among them.
        finish_reason: ``"stop"`` for an end token or stop text, ``"length"`` when the budget ran out.
        prompt_tokens: number of tokens of the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int


class SequenceState:
    """A row being generated: collects tokens, settles text, notices its end."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        tokenizer: Tokenizer,
        stops: Sequence[str],
        eos: frozenset[int],
        stream: Stream | None,
    ) -> None:
        self.prompt = prompt
        self._index = index
        self._text = TextStream(tokenizer)
        self._stops = stops
        self._eos = eos
        self._stream = stream
        self._sent = 0
        self._end: int | None = None
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None

    def push(self, token_id: int) -> None:
        """Take the next token of a row that has not finished."""
        if token_id in self._eos:
            self._text.finish()
            self._find_stop()
            self.finish_reason = "stop"
        else:
            self.token_ids.append(token_id)
            if self._text.push(token_id):
                self._find_stop()
        self._send()

    def finish(self) -> Generation:
        """The result; a row that no end was found for ran out of its budget."""
        if self.finish_reason is None:
            self._text.finish()
            self._find_stop()
            self.finish_reason = self.finish_reason or "length"
            self._send()
        text = self._text.text if self._end is None else self._text.text[: self._end]
        return Generation(text, tuple(self.token_ids), self.finish_reason, len(self.prompt))

    def _find_stop(self) -> None:
        """Look for a stop text in what was not sent: what was sent is not the beginning of one."""
        found = [at for stop in self._stops if (at := self._text.text.find(stop, self._sent)) >= 0]
        if found:
            self._end = min(found)
            self.finish_reason = "stop"

    def _send(self) -> None:
        """Stream what is certain: not the beginning of what may become a stop text."""
        text = self._text.text
        end = len(text) if self._end is None else self._end
        if self.finish_reason is None:
            end -= max((_overlap(text, stop) for stop in self._stops), default=0)
        if end > self._sent:
            if self._stream is not None:
                self._stream(self._index, text[self._sent : end])
            self._sent = end


def decode(
    decoding: DecodeState,
    embedder: InputEmbedder,
    tasks: AdapterMapping,
    rows: list[SequenceState],
    sampling: Sampling,
    max_new_tokens: int,
    draft_tokens: int = 0,
) -> None:
    """Tokens until every row has ended; a row that has ended leaves the batch.

    A step takes one token of each row. The only row of a batch, or the last one left of it, goes on by drafts, where
    the decoding can check them.

    Args:
        decoding: the prompts, run.
        embedder: what generated tokens go through.
        tasks: the task of each row.
        rows: collects each row's tokens.
        sampling: how tokens are chosen.
        max_new_tokens: tokens a row at most.
        draft_tokens: guesses at once at most; 0 for none.
    """
    alive = list(range(len(rows)))
    generators = sampling.generators(len(rows))
    # Asked once: it takes some 10 µs, which no step should.
    checking = decoding if draft_tokens and isinstance(decoding, SpeculativeDecodeState) else None
    for step in range(max_new_tokens):
        if checking is not None and len(alive) == 1:
            own, choose = rows[alive[0]], partial(sampling.choose, generator=generators[alive[0]])
            _decode_by_drafts(checking, embedder, tasks, own, choose, max_new_tokens - step, draft_tokens)
            return
        logits = decoding.logits
        chosen = np.empty((len(alive), 1), np.int64)
        for place, row in enumerate(alive):
            chosen[place] = token = sampling.choose(logits[place], generators[row])
            rows[row].push(token)
        kept = _drop_ended(decoding, [rows[row].finish_reason is not None for row in alive])
        if not kept or step + 1 == max_new_tokens:
            return
        if len(kept) < len(alive):
            alive, chosen, tasks = [alive[place] for place in kept], chosen[kept], tasks.take(kept)
        decoding.step(embedder.lookup(chosen, tasks))


def _decode_by_drafts(
    decoding: SpeculativeDecodeState,
    embedder: InputEmbedder,
    tasks: AdapterMapping,
    row: SequenceState,
    choose: Callable[[Array], int],
    max_new_tokens: int,
    draft_tokens: int,
) -> None:
    """Go on with the only row until it has ended, or has ``max_new_tokens`` more tokens: guesses are checked in one pass.

    What is chosen, and with which random numbers, is what steps of one token would choose.
    """
    lookup = PromptLookup((*row.prompt, *row.token_ids), draft_tokens)
    logits, guesses = decoding.logits, list[int]()
    while True:
        for right, scores in enumerate(logits):
            token = choose(scores)
            row.push(token)
            max_new_tokens -= 1
            if row.finish_reason is not None or not max_new_tokens:
                return
            lookup.push(token)
            if right == len(guesses) or token != guesses[right]:
                break
        decoding.rollback(len(guesses) - right)
        lookup.learn(len(guesses), right)
        guesses = lookup.guess(max_new_tokens - 1)
        logits = decoding.extend(embedder.lookup(np.array([[token, *guesses]]), tasks))


def _drop_ended(decoding: DecodeState, ended: list[bool]) -> list[int]:
    """Drop the rows that have ended; the former places of the others, in their new order."""
    kept = list(range(len(ended)))
    # From the end, so that a row that takes another's place has been looked at.
    for place in reversed(range(len(ended))):
        if ended[place]:
            decoding.drop(place)
            kept[place] = kept[-1]
            kept.pop()
    return kept


def check_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop texts as a tuple, ``None`` for none; raises ``RequestError`` for an empty one."""
    if stop is None:
        return ()
    stops = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    if not all(isinstance(text, str) for text in stops):
        raise RequestError(f"stop is {stop!r}, expected a text or a list of texts")
    if "" in stops:
        raise RequestError("stop holds an empty text, which would end every row at once: leave it out")
    return stops


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
