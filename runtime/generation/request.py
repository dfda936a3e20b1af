"""Request: a prompt with its task and settings, as ``Deployment.submit`` takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adalink.runtime.arguments import check_kind, check_whole
from adalink.runtime.errors import RequestError
from adalink.runtime.generation.stop_texts import check_stops
from adalink.runtime.request import is_number
from adalink.runtime.sampling.logits_processors import LogitsProcessor
from adalink.runtime.sampling.sampler import SamplingParams
from adalink.runtime.sampling.structured_output import StructuredOutput
from adalink.runtime.text.messages import ChatOptions, Conversation
from adalink.runtime.vision.images import ImageInput

_MOST_LOGPROBS = 1000


@dataclass(frozen=True)
class Request:
    """One request. Arguments that ``Deployment.generate`` has too are described there.

    Attributes:
        prompt: a text, or token ids; or else
        messages: a conversation.
        images: images of the prompt.
        task: its task; ``None`` is the base model.
        max_new_tokens: most new tokens.
        sampling: how tokens are chosen.
        stop: texts that end it; an empty list for none, ``None`` for those of the base.
        stop_token_ids: tokens that end it, beside the base's end tokens.
        chat: apply the model's chat template.
        logprobs: how many of the likeliest tokens are reported at each generated token, with the chosen one's log
            probability; ``None`` reports nothing. Penalties, bans and temperature do not count in them.
        processors: logits processors of the caller's, after those of ``sampling``; they serve this request alone.
        structured: what the text must be, such as JSON of a schema; vLLM's ``structured_outputs``.
        choice: with one seed, each choice draws other random numbers: that of ``generate`` is the row.
        timeout: seconds until it ends with ``RequestTimeoutError``, waiting included.
        draft_tokens: most draft tokens of a pass, while no other request runs.
    """

    prompt: str | Sequence[int] | None = None
    messages: Conversation | None = None
    images: Sequence[ImageInput] = ()
    task: str | None = None
    max_new_tokens: int | None = None
    sampling: SamplingParams | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    chat: bool | ChatOptions = False
    logprobs: int | None = None
    processors: Sequence[LogitsProcessor] = ()
    structured: StructuredOutput | None = None
    choice: int = 0
    timeout: float | None = None
    draft_tokens: int | None = None

    def check(self, vocab_size: int) -> None:
        """Check what no other part checks; raises ``RequestError``."""
        check_kind(self.sampling, "sampling", SamplingParams, "SamplingParams or None")
        check_kind(self.structured, "structured", StructuredOutput, "a StructuredOutput or None")
        check_stops(self.stop)
        if self.logprobs is not None:
            check_whole(self.logprobs, "logprobs", 0)
            if self.logprobs > _MOST_LOGPROBS:
                raise RequestError(f"logprobs is {self.logprobs}, expected at most {_MOST_LOGPROBS}")
        check_whole(self.choice, "choice", 0)
        if isinstance(self.stop_token_ids, (str, bytes)) or not isinstance(self.stop_token_ids, Sequence):
            raise RequestError(f"stop_token_ids is {self.stop_token_ids!r:.80}, expected a list of token ids")
        for token in self.stop_token_ids:
            check_whole(token, "stop_token_ids", 0)
            if token >= vocab_size:
                raise RequestError(f"stop_token_ids holds {token}, expected token ids from 0 to {vocab_size - 1}")
        if self.timeout is not None and (not is_number(self.timeout) or not self.timeout > 0):
            raise RequestError(f"timeout is {self.timeout!r}, expected a number of seconds above 0")
        if not all(callable(processor) for processor in self.processors):
            raise RequestError("processors holds what is no function of scores and sequence")
