"""Text generator: requests to rows of the scheduler, and a batch of them to its results."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from adalink.runtime.errors import RequestError
from adalink.runtime.finite import row_label
from adalink.runtime.generation.handle import Handle
from adalink.runtime.generation.prompt import Prompt
from adalink.runtime.generation.request import Request
from adalink.runtime.generation.row import Row, RowOptions
from adalink.runtime.generation.scheduler import Scheduler
from adalink.runtime.generation.sequence import Generation, SequenceState, Stream, stops_behind
from adalink.runtime.generation.speculative_decoding import draft_limit
from adalink.runtime.generation.stop_texts import mark_stops, resolve_stops
from adalink.runtime.generation.token_chooser import make_chooser, sequence_begin
from adalink.runtime.input_processor import InputProcessor
from adalink.runtime.model_runner import ModelRunner
from adalink.runtime.options import OpenOptions
from adalink.runtime.request import Prompts, Tasks
from adalink.runtime.sampling.grammar import Grammars
from adalink.runtime.sampling.logits_processors import LogitsProcessor
from adalink.runtime.sampling.sampler import SamplingParams
from adalink.runtime.storage.manifest import Manifest, Variant
from adalink.runtime.tasks.adapter_mapping import NO_ADAPTER
from adalink.runtime.text.messages import ChatOptions, Messages
from adalink.runtime.vision.placeholders import Images


class TextGenerator:
    """Generates text with one base; safe for several threads.

    Attributes:
        scheduler: runs the requests.
    """

    def __init__(
        self, manifest: Manifest, variant: Variant, inputs: InputProcessor, runner: ModelRunner, options: OpenOptions
    ) -> None:
        self._base, self._variant, self._inputs = manifest.base, variant, inputs
        self._kv_cache_dtype = options.kv_cache_dtype
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()
        self.scheduler = Scheduler(
            runner, manifest.base, slots=options.slots, capacity=options.context, queue_limit=options.queue_limit
        )

    def submit(self, request: Request) -> Handle:
        """See ``Deployment.submit``."""
        prompts: Prompts | None = None if request.prompt is None else [request.prompt]
        images: Images = [list(request.images)] if request.images else None
        row = self._make_rows(prompts, request.messages, images, request.task, request.chat, request)[0]
        self.scheduler.submit([row])
        return row.handle

    def generate(
        self,
        prompts: Prompts | None,
        messages: Messages | None,
        images: Images,
        tasks: Tasks,
        settings: Request,
        stream: Stream | None,
    ) -> list[Generation]:
        """See ``Deployment.generate``; ``settings`` has what is the same for all prompts."""
        rows = self._make_rows(prompts, messages, images, tasks, settings.chat, settings)
        handles = [row.handle for row in rows]
        try:
            self.scheduler.submit(rows)
            if stream is not None:
                _pass_on(handles, stream)
            return [handle.result() for handle in handles]
        except BaseException:  # also Ctrl-C, and whatever ``stream`` raises
            for handle in handles:
                handle.cancel()
            raise

    def _make_rows(
        self,
        prompts: Prompts | None,
        messages: Messages | None,
        images: Images,
        tasks: Tasks,
        chat: bool | ChatOptions,
        settings: Request,
    ) -> list[Row]:
        base = self._base
        if base.kind == "encoder":
            raise RequestError(f"{base.name} is an encoder and generates no text: call run()")
        settings.check(base.vocab_size)
        sampling = settings.sampling or SamplingParams()
        params = sampling.resolve(base.generation, base.vocab_size)
        # Neither the base's stop texts nor its forced end may cut a structured text, and call it complete.
        has_defaults = sampling.base_defaults and settings.structured is None
        stops = resolve_stops(settings.stop, base.generation, base_defaults=has_defaults)
        drafts = draft_limit(settings.draft_tokens, base, self._variant, self._kv_cache_dtype)
        if messages is not None:
            prompts, images, chat = self._inputs.encode_messages(prompts, messages, images, chat)
        checked = self._inputs.process_prompts(
            prompts, images, tasks, chat=chat, max_new_tokens=settings.max_new_tokens
        )
        names = [prompt.task for prompt in checked]
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        deadline = None if settings.timeout is None else time.monotonic() + settings.timeout
        tokenizer = self._inputs.tokenizer
        marked = mark_stops(stops, tokenizer.special_ids if stops else {})
        ends = (*base.eos_token_ids, *settings.stop_token_ids)
        # As in transformers, a stop text of the base's may begin in the prompt.
        is_base_stop = settings.stop is None and base.kind == "decoder"
        if settings.structured is not None:
            params = replace(params, forced_eos_token_ids=None)
        rows = []
        for index, prompt in enumerate(checked):
            options = RowOptions(prompt.task, row_label(index, names), drafts, settings.logprobs, deadline)
            generator = np.random.default_rng([seed, settings.choice + index])
            processors = [*self._grammar(settings, params, prompt, ends), *settings.processors]
            chooser = make_chooser(params, processors, base, prompt, ends, generator, options.label)
            texts = stops_behind(prompt.token_ids, tokenizer, marked) if is_base_stop else marked
            make_sequence = partial(SequenceState, index, prompt.token_ids, tokenizer, texts, frozenset(ends))
            generated = NO_ADAPTER if base.kind == "encoder-decoder" else prompt.tasks
            rows.append(Row(prompt, make_sequence, chooser, generated, options))
        return rows

    def _grammar(
        self, settings: Request, params: SamplingParams, prompt: Prompt, ends: Sequence[int]
    ) -> list[LogitsProcessor]:
        """The processor of a row's structured output, if the request has one."""
        if settings.structured is None:
            return []
        with self._lock:
            if self._grammars is None:
                self._grammars = Grammars(self._inputs.tokenizer, self._base)
        begin = sequence_begin(self._base, prompt, params)
        return [self._grammars.processor(settings.structured, begin, ends)]


def _pass_on(handles: Sequence[Handle], stream: Stream) -> None:
    """Call ``stream`` in this thread with each piece of each request as it comes, until all have ended."""
    events: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index, handle in enumerate(handles):
        handle.listen(partial(events.put, index))
    running = set(range(len(handles)))
    while running:
        index = events.get()
        while (piece := handles[index].take()) is not None:
            if piece.text:
                stream(index, piece.text)
        if handles[index].is_done and not handles[index].has_pieces:
            running.discard(index)
