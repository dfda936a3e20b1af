"""Fields of requests, as OpenAI's API and vLLM's extra fields have them.

A field that is not listed is ignored, as OpenAI's servers do. A listed field of a wrong type or range is an error that
names it. ``null`` is the same as leaving a field out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Ratio = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
# Likeliest tokens of a position, and choices of a request.
_MOST_LOGPROBS, _MOST_CHOICES = 20, 128
# Labels that one request may name; each is scored behind every text.
_MOST_LABELS = 256
Choices = Annotated[int, Meta(ge=1, le=_MOST_CHOICES)]
Logprobs = Annotated[int, Meta(ge=0, le=_MOST_LOGPROBS)]
MOST_CHOICES = _MOST_CHOICES


class StreamOptions(msgspec.Struct, kw_only=True):
    """How an answer is streamed."""

    include_usage: bool | None = None


class GenerateFields(msgspec.Struct, kw_only=True):
    """What requests for chat and for completions share."""

    model: Name
    max_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Ratio | None = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: Count | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = None
    # vLLM's
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Ratio | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    stop_token_ids: list[Count] | None = None
    min_tokens: Count | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    # Known, and refused when they ask for something: see `adalink.serving.openai.unsupported`.
    best_of: int | None = None
    ignore_eos: bool | None = None
    use_beam_search: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None


class ChatFields(GenerateFields, kw_only=True):
    """A request for ``/v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    # vLLM's
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    chat_template: str | None = None


class CompletionFields(GenerateFields, kw_only=True):
    """A request for ``/v1/completions``."""

    prompt: str | list[str | int | list[int]]
    logprobs: Logprobs | None = None
    echo: bool | None = None
    suffix: str | None = None


class EmbeddingFields(msgspec.Struct, kw_only=True):
    """A request for ``/v1/embeddings``; ``pooling`` and ``normalize`` are those of ``Deployment.encode``."""

    model: Name
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: str | None = None
    # vLLM's: -1 cuts a long text to what the model's files allow.
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=-1)] | None = None
    pooling: str | list[str] | None = None
    normalize: bool | None = None


class ClassifyFields(msgspec.Struct, kw_only=True):
    """A request for ``/v1/classify``; ``labels`` and ``calibration`` are those of ``Deployment.classify``."""

    model: Name
    input: str | list[str | list[str]]
    labels: Annotated[list[str], Meta(max_length=_MOST_LABELS)] | None = None
    calibration: str | None = None
    user: str | None = None


class TokenizeFields(msgspec.Struct, kw_only=True):
    """A request for ``/tokenize``, as vLLM has it."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeFields(msgspec.Struct, kw_only=True):
    """A request for ``/detokenize``, as vLLM has it."""

    model: Name | None = None
    tokens: list[Count]


class LoadFields(msgspec.Struct, kw_only=True):
    """A request for ``/v1/load_lora_adapter``, as vLLM has it."""

    lora_name: Name
    lora_path: Name
    load_inplace: bool | None = None


class UnloadFields(msgspec.Struct, kw_only=True):
    """A request for ``/v1/unload_lora_adapter``, as vLLM has it."""

    lora_name: Name
