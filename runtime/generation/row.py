"""Row: one request on its way through the scheduler, from the queue to its end."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.errors import RequestTimeoutError
from adalink.runtime.generation.handle import Handle, TextPiece
from adalink.runtime.generation.prefix_cache import PrefixKey
from adalink.runtime.generation.prompt import Prompt
from adalink.runtime.generation.sequence import SequenceState, TokenLogprobs
from adalink.runtime.generation.speculative_decoding import PromptLookup
from adalink.runtime.generation.token_chooser import TokenChooser
from adalink.runtime.tasks.adapter_mapping import AdapterMapping


@dataclass(frozen=True)
class RowOptions:
    """What a request asks for beside its prompt and its sampling.

    Attributes:
        task: its task; ``None`` for the base model.
        label: what errors call it.
        draft_tokens: most draft tokens of a pass; 0 turns speculative decoding off.
        logprobs: how many of the likeliest tokens are reported at each position, with the chosen one; ``None``: none.
        deadline: when it ends unanswered, by ``time.monotonic``; ``None`` for never.
    """

    task: str | None
    label: str
    draft_tokens: int = 0
    logprobs: int | None = None
    deadline: float | None = None


class Row:
    """One request: prompt, sequence so far, token chooser and handle.

    Attributes:
        prompt: its prompt.
        generated_tasks: the adapter mapping of a batch of its task alone, for generated tokens.
        handle: what its sender holds.
        next_token: chosen, and not run yet.
        cached_tokens: positions of the prompt that came from the prefix cache.
        prefix_key: base and adapter of its states in the prefix cache, where there is one.
        prefix_positions: key of each position of its prompt there.
        prefix: states of the beginning of its prompt, if the cache has them; they follow a KV prefix.
    """

    def __init__(
        self,
        prompt: Prompt,
        make_sequence: Callable[[Callable[[int, str], None]], SequenceState],
        chooser: TokenChooser,
        generated_tasks: AdapterMapping,
        options: RowOptions,
    ) -> None:
        """Prepare a row.

        Args:
            prompt: its prompt.
            make_sequence: makes its sequence state, given what takes the streamed text.
            chooser: chooses its tokens.
            generated_tasks: see the attributes.
            options: what it asks for beside.
        """
        self.prompt = prompt
        self.generated_tasks = generated_tasks
        self.options = options
        self.handle = Handle()
        self.next_token = -1
        self.cached_tokens = 0
        self.prefix_key = PrefixKey("", "", "")
        self.prefix_positions: Array = np.zeros(0, np.int64)
        self.prefix: Array | None = None
        # A row that holds itself would stay in memory until the garbage collector looks through everything.
        own: weakref.ref[Row] = weakref.ref(self)
        self._sequence = make_sequence(lambda _, text: _send(own, text))
        self._chooser = chooser
        self._lookup: PromptLookup | None = None
        self._chosen: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._sent = 0
        self._is_ended = False

    @property
    def is_ended(self) -> bool:
        """Whether no token follows."""
        return self._is_ended

    @property
    def tokens_left(self) -> int:
        """Most tokens that may follow."""
        return self.prompt.max_new_tokens - len(self._chosen)

    @property
    def run_tokens(self) -> list[int]:
        """Generated tokens that the engine has run: all but the last one chosen."""
        return self._chosen[:-1]

    @property
    def lookup(self) -> PromptLookup:
        """Its draft tokens, from prompt and text so far."""
        if self._lookup is None:
            self._lookup = PromptLookup((*self.prompt.token_ids, *self._chosen), self.options.draft_tokens)
        return self._lookup

    @property
    def initial_states(self) -> Array | None:
        """Keys and values with which it begins: its task's KV prefix, and what the prefix cache knows of its prompt."""
        kv_prefix = self.prompt.kv_prefix
        return self.prefix if kv_prefix is None else kv_prefix.followed_by(self.prefix)

    def choose(self, logits: Array) -> None:
        """Choose the next token; the row has ended if it was the last, or if it failed.

        Args:
            logits: shape ``(vocab,)``; not changed.
        """
        try:
            token = self._chooser(logits)
            if self.options.logprobs is not None:
                self._logprobs.append(token_logprobs(logits, token, self.options.logprobs))
            self._chosen.append(token)
            self.next_token = token
            self._sequence.push(token)
        except Exception as error:  # a processor of the caller's may raise anything: it is the caller's to see
            self.fail(error)
            return
        if self._lookup is not None:
            self._lookup.push(token)
        if self._sequence.finish_reason is not None or not self.tokens_left:
            self._is_ended = True

    def finish(self) -> None:
        """End it with its result, unless it failed."""
        self._is_ended = True
        if self.handle.is_done:
            return
        generation = self._sequence.finish(self._logprobs, self.cached_tokens)
        self.send("")
        self.handle.finish(generation)

    def fail(self, error: BaseException) -> None:
        """End it with an error."""
        self._is_ended = True
        self.handle.fail(error)

    def stop_if_over(self) -> bool:
        """End it if it was cancelled or its deadline has passed; returns whether it has."""
        if self.handle.is_cancelled:
            self._sequence.cancel()
            self.finish()
        elif self.options.deadline is not None and time.monotonic() > self.options.deadline:
            self.fail(
                RequestTimeoutError(
                    f"{self.options.label}: its time ended after {len(self._chosen)} tokens: allow more time, ask for "
                    "fewer tokens, or send fewer requests at once"
                )
            )
        return self._is_ended

    def send(self, text: str) -> None:
        """Give new text to the handle, with the tokens since the last."""
        token_ids = self._sequence.token_ids
        if text or len(token_ids) > self._sent:
            new, scores = token_ids[self._sent :], self._logprobs[self._sent : len(token_ids)]
            self._sent = len(token_ids)
            self.handle.push(TextPiece(text, tuple(new), tuple(scores)))


def _send(own: weakref.ref[Row], text: str) -> None:
    row = own()
    assert row is not None  # the row itself asks
    row.send(text)


def token_logprobs(logits: Array, token: int, count: int) -> TokenLogprobs:
    """Log probabilities of the chosen token and of the ``count`` likeliest, before penalties, bans and temperature.

    Args:
        logits: shape ``(vocab,)``.
        token: the chosen token.
        count: how many of the likeliest.
    """
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    top = np.argpartition(-scores, min(count, len(scores) - 1))[:count] if count else np.zeros(0, np.int64)
    top = top[np.argsort(-scores[top], kind="stable")]
    return TokenLogprobs(token, float(scores[token]), tuple((int(other), float(scores[other])) for other in top))
