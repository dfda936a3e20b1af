"""The decode loop: a batch of prompts, each row with its own task, in front of one engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from adalink.runtime.engine import Array, Engine
from adalink.runtime.errors import RequestError
from adalink.runtime.sampling import Sampling
from adalink.runtime.tokenizer import TextStream, Tokenizer

Stream = Callable[[int, str], None]


@dataclass(frozen=True)
class Generation:
    """What one prompt became.

    Attributes:
        text: the generated text, without the prompt.
        token_ids: its tokens, without the one that ended it.
        finish_reason: ``"stop"`` for an end token or stop text, ``"length"`` when the budget ran out.
        prompt_tokens: number of tokens of the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int


class Row:
    """A row being generated: collects tokens, settles text, notices its end."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, stops: Sequence[str], eos: frozenset[int], stream: Stream | None
    ) -> None:
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

    def finish(self, prompt_tokens: int) -> Generation:
        """The result; a row that no end was found for ran out of its budget."""
        if self.finish_reason is None:
            self._text.finish()
            self._find_stop()
            self.finish_reason = self.finish_reason or "length"
            self._send()
        text = self._text.text if self._end is None else self._text.text[: self._end]
        return Generation(text, tuple(self.token_ids), self.finish_reason, prompt_tokens)

    def _find_stop(self) -> None:
        """Look for a stop text in what is new, with the length of a stop text before it."""
        margin = max((len(stop) for stop in self._stops), default=0)
        start = max(0, self._sent - margin)
        found = [at for stop in self._stops if (at := self._text.text.find(stop, start)) >= 0]
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
    engine: Engine,
    first_feeds: dict[str, Array],
    embed_next: Callable[[Array], Array],
    rows: list[Row],
    sampling: Sampling,
    max_new_tokens: int,
    pad_token_id: int,
) -> None:
    """Run the prompt once, then one step a token until every row has ended.

    Args:
        engine: a graph with a KV cache and ``logits``.
        first_feeds: what the engine is fed for the prompt; ``attention_mask`` of shape ``(batch, seq)``.
        embed_next: embeddings with shape ``(batch, 1, d)`` of the tokens just chosen, shape ``(batch, 1)``.
        rows: collects each row's tokens.
        sampling: how tokens are chosen.
        max_new_tokens: tokens a row at most.
        pad_token_id: what a finished row is fed.
    """
    batch, length = first_feeds["attention_mask"].shape
    mask = np.ones((batch, length + max_new_tokens), np.int64)
    mask[:, :length] = first_feeds["attention_mask"]
    positions = first_feeds["attention_mask"].sum(axis=1, keepdims=True)
    constant = {name: value for name, value in first_feeds.items() if name.startswith("encoder_")}
    generators = sampling.generators(batch)
    feeds, cache = {name: first_feeds[name] for name in engine.inputs}, None
    for step in range(max_new_tokens):
        logits, cache = engine.run(feeds, cache)
        chosen = np.full((batch, 1), pad_token_id, np.int64)
        for index, row in enumerate(rows):
            if row.finish_reason is None:
                chosen[index] = sampling.choose(logits[index, -1], generators[index])
                row.push(int(chosen[index, 0]))
        if all(row.finish_reason for row in rows) or step + 1 == max_new_tokens:
            return
        following = {
            "inputs_embeds": embed_next(chosen),
            "attention_mask": mask[:, : length + step + 1],
            "position_ids": positions + step,
            **constant,
        }
        feeds = {name: following[name] for name in engine.inputs}


def pad_left(prompts: list[list[int]], pad_token_id: int) -> tuple[Array, Array]:
    """Token ids and mask, both int64 of shape ``(batch, longest)``, with the padding before the tokens."""
    longest = max(len(ids) for ids in prompts)
    ids = np.full((len(prompts), longest), pad_token_id, np.int64)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, tokens in enumerate(prompts):
        ids[row, longest - len(tokens) :] = tokens
        mask[row, longest - len(tokens) :] = 1
    return ids, mask


def positions_of(mask: Array) -> Array:
    """Position of each token among the tokens of its row, int64 of the mask's shape; padding gets 0."""
    positions: Array = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return positions


def check_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop texts as a tuple; raises ``RequestError`` for an empty one."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise RequestError("stop holds an empty text, which would end every row at once: leave it out")
    return stops


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
