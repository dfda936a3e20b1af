"""From the fields of a request to requests of the runtime, one for each prompt and choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adalink.runtime.generation.request import Request
from adalink.runtime.sampling.sampler import SamplingParams
from adalink.runtime.storage.manifest import Base
from adalink.serving.api_error import ApiError
from adalink.serving.openai.conversations import chat_options, check_parts
from adalink.serving.openai.fields import MOST_CHOICES, ChatFields, CompletionFields, GenerateFields
from adalink.serving.openai.structured import structured_output
from adalink.serving.openai.unsupported import refuse_unsupported


def chat_requests(fields: ChatFields, base: Base, task: str | None, seconds: float | None) -> list[Request]:
    """The requests of ``/v1/chat/completions``; arguments and errors are those of ``completion_requests``."""
    refuse_unsupported(fields)
    check_parts(fields.messages)
    if fields.top_logprobs and not fields.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    request = Request(
        messages=fields.messages,
        chat=chat_options(fields),
        max_new_tokens=_one_of(fields),
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
    )
    return _for_choices([_with_settings(request, fields, base, task, seconds)], fields.n or 1)


def completion_requests(fields: CompletionFields, base: Base, task: str | None, seconds: float | None) -> list[Request]:
    """The requests of ``/v1/completions``, all choices of the first prompt first.

    Args:
        fields: the client's fields.
        base: the base, for its default settings.
        task: the task; ``None`` for the base model.
        seconds: the deadline of each; ``None`` for none.

    Raises:
        ApiError: a field is wrong, or asks for what is not supported (400).
        RequestError: a setting is out of range.
    """
    refuse_unsupported(fields)
    prompts, count = split_prompts(fields.prompt, "prompt"), fields.n or 1
    if len(prompts) * count > MOST_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts by {count} choices are more than {MOST_CHOICES}", "prompt")
    plain = Request(max_new_tokens=fields.max_tokens, logprobs=fields.logprobs)
    settled = _with_settings(plain, fields, base, task, seconds)
    return _for_choices([replace(settled, prompt=prompt) for prompt in prompts], count)


def _with_settings(
    request: Request, fields: GenerateFields, base: Base, task: str | None, seconds: float | None
) -> Request:
    return replace(
        request,
        task=task,
        sampling=_sampling(fields, base),
        stop=fields.stop or None,  # the base's own
        stop_token_ids=fields.stop_token_ids or (),
        structured=structured_output(fields),
        timeout=seconds,
    )


def _sampling(fields: GenerateFields, base: Base) -> SamplingParams:
    """Sampling parameters; with a filter alone, OpenAI's temperature of 1 instead of a base's greedy default."""
    params = SamplingParams(
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=None if fields.top_k is None else max(fields.top_k, 0),
        min_p=fields.min_p,
        seed=fields.seed,
        repetition_penalty=fields.repetition_penalty,
        min_new_tokens=fields.min_tokens,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias=_biases(fields.logit_bias),
    )
    has_top_p = fields.top_p is not None and fields.top_p < 1
    filters = has_top_p or (fields.top_k or 0) > 0 or (fields.min_p or 0) > 0
    if fields.temperature is None and filters and not params.resolve(base.generation, base.vocab_size).temperature:
        return replace(params, temperature=1.0)
    return params


def _biases(biases: dict[str, float] | None) -> dict[int, float] | None:
    """Biases by token id, which JSON writes as texts."""
    if wrong := [token for token in biases or () if not (token.isascii() and token.isdecimal() and len(token) < 10)]:
        raise ApiError(400, f"logit_bias has {wrong[0]!r:.40}, expected token ids", "logit_bias")
    return {int(token): bias for token, bias in biases.items()} if biases else None


def _for_choices(requests: Sequence[Request], count: int) -> list[Request]:
    """Each request ``count`` times; every one draws other random numbers."""
    copies = [request for request in requests for _ in range(count)]
    return [replace(request, choice=index) for index, request in enumerate(copies)]


def _one_of(fields: ChatFields) -> int | None:
    """OpenAI's new name of ``max_tokens`` first."""
    return fields.max_completion_tokens or fields.max_tokens


def split_prompts(prompt: str | list[str | int | list[int]], field: str) -> list[str | list[int]]:
    """The prompts that a field of OpenAI's stands for: one or several, as texts or token ids; raises ``ApiError``."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(entry) for entry in prompt}
    if len(kinds) != 1:
        what = "empty" if not kinds else "a mixture"
        raise ApiError(400, f"{field} is {what}, expected a text, texts, token ids, or lists of token ids", field)
    if kinds == {int}:
        return [[entry for entry in prompt if isinstance(entry, int)]]
    return [entry for entry in prompt if not isinstance(entry, int)]
