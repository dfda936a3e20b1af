"""Input processing: checks, tokenises and pads a request, and adds adapters, soft prompts and images."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy.typing as npt

from adalink.runtime.arguments import check_whole
from adalink.runtime.arrays import Array
from adalink.runtime.batch_inputs import BatchInputs
from adalink.runtime.engine import Engine
from adalink.runtime.errors import IntegrityError, RequestError
from adalink.runtime.generation.prompt import Prompt
from adalink.runtime.heap import release_freed_memory
from adalink.runtime.request import (
    Prompts,
    Tasks,
    check_embeds,
    check_input_ids,
    check_length,
    check_mask,
    check_modality,
    check_prompts,
    check_token_types,
)
from adalink.runtime.storage.integrity import read_verified
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.tasks.adapter_mapping import AdapterMapping
from adalink.runtime.tasks.kv_prefix import KvPrefix
from adalink.runtime.tasks.registry import TaskRegistry
from adalink.runtime.tasks.soft_prompt import SoftPromptLayout
from adalink.runtime.text.messages import ChatOptions, Messages, as_options, images_of, split_batch
from adalink.runtime.text.tokenizer import Tokenizer
from adalink.runtime.vision.placeholders import ImageEmbeds, Images, check_expanded, check_images, expand
from adalink.runtime.vision.tower import OpenVision

# Most new tokens of a prompt where neither the request nor the base says.
MAX_NEW_TOKENS = 64


class InputProcessor:
    """Makes batches for one deployment; safe for several threads."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        tasks: TaskRegistry,
        vision: OpenVision,
        engine: Engine,
        check_kv_prefix: Callable[[KvPrefix], None],
        context: int | None = None,
    ) -> None:
        """Prepare.

        Args:
            path: the deployment.
            manifest: its manifest.
            tasks: its tasks.
            vision: its vision tower.
            engine: takes the batches.
            check_kv_prefix: raises an error for a KV prefix that the engine cannot take.
            context: most positions of a prompt and its reply.
        """
        self._check_kv_prefix = check_kv_prefix
        self._path, self._manifest, self._base = path, manifest, manifest.base
        self._tasks, self._vision, self._padding_side = tasks, vision, engine.padding_side
        self._capacity = None if engine.profile is None else engine.profile.capacity
        self._context = context
        self._tokenizer: Tokenizer | None = None
        self._lock = threading.Lock()

    @property
    def tokenizer(self) -> Tokenizer:
        """See ``Deployment.tokenizer``."""
        with self._lock:
            if self._tokenizer is None:
                if self._base.tokenizer is None:
                    raise RequestError(f"{self._base.name} was exported without a tokenizer: pass input_ids to run()")
                template = self._base.chat_template
                text = None if template is None else self._read_text(template)
                data = read_verified(self._path, self._manifest, self._base.tokenizer)
                self._tokenizer = Tokenizer(data, text, self._base)
                release_freed_memory()
            return self._tokenizer

    def _read_text(self, path: str) -> str:
        try:
            return read_verified(self._path, self._manifest, path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise IntegrityError(f"{path}: byte {error.start} is not UTF-8; export the base again") from error

    def process_prompts(
        self,
        prompts: Prompts | None,
        images: Images,
        tasks: Tasks,
        *,
        chat: bool | ChatOptions,
        max_new_tokens: int | None,
        encode_images: bool = True,
    ) -> list[Prompt]:
        """Tokenise and check prompts, and encode their images.

        Args:
            prompts: as in ``Deployment.generate``, which raises what this does.
            images: likewise.
            tasks: likewise.
            chat: likewise.
            max_new_tokens: likewise; counts towards the longest sequence.
            encode_images: whether images are encoded, rather than only checked.
        """
        base = self._base
        if max_new_tokens is not None:
            check_whole(max_new_tokens, "max_new_tokens", 0 if base.kind == "encoder" else 1)
        texts = check_prompts(prompts, base)
        row_tasks = self._tasks.resolve_rows(tasks, len(texts))
        row_images = check_images(images, len(texts), base)
        kv_prefixes = [self._kv_prefix(mapping) for _, mapping in row_tasks]
        tokens = [
            self._tokenize(text, chat, len(row), kv_prefix)
            for text, row, kv_prefix in zip(texts, row_images, kv_prefixes, strict=True)
        ]
        prepared = self._vision.prepare(row_images) if any(row_images) else [[] for _ in texts]
        tokens = [expand(prompt, prepared[row], row, base) for row, prompt in enumerate(tokens)]
        lengths, limits = [], []
        for index, (prompt, (_, mapping), kv_prefix) in enumerate(zip(tokens, row_tasks, kv_prefixes, strict=True)):
            if not prompt:
                raise RequestError(f"prompt {index} has no tokens: give it some text")
            check_input_ids([prompt], base)
            lengths.append(sum(len(vectors.vectors) for vectors in mapping.soft_prompts(1) if vectors is not None))
            before = lengths[-1] + (0 if kv_prefix is None else len(kv_prefix))
            limits.append(self._limit(max_new_tokens, before + len(prompt)))
        embeds = self._vision.embed(prepared) if encode_images and any(row_images) else [[] for _ in tokens]
        return [
            Prompt(prompt, task, mapping, row_embeds, length, limit, kv_prefix)
            for prompt, (task, mapping), row_embeds, length, limit, kv_prefix in zip(
                tokens, row_tasks, embeds, lengths, limits, kv_prefixes, strict=True
            )
        ]

    def encode_messages(
        self, prompts: Prompts | None, messages: Messages, images: Images, chat: bool | ChatOptions
    ) -> tuple[list[list[int]], Images, bool]:
        """Prompts, images and ``chat`` of ``process_prompts`` for conversations; arguments are those of ``generate``.

        Raises:
            RequestError: a conversation is wrong, or images are in the messages and beside them.
        """
        if prompts is not None:
            raise RequestError("give either prompts or messages, not both")
        conversations = split_batch(messages)
        encoded, inside = [], []
        for row, conversation in enumerate(conversations):
            try:
                encoded.append(self.tokenizer.encode_messages(conversation, as_options(chat)))
                inside.append(images_of(conversation))
            except RequestError as error:
                raise RequestError(f"conversation {row}: {error}" if len(conversations) > 1 else str(error)) from error
        if not any(inside):
            return encoded, images, False
        if images is not None:
            raise RequestError("give images either in the messages or in images, not in both")
        return encoded, inside, False

    def process_arrays(
        self,
        input_ids: npt.ArrayLike | None,
        inputs_embeds: npt.ArrayLike | None,
        modality: npt.ArrayLike | None,
        tasks: Tasks,
        images: Images,
        token_type_ids: npt.ArrayLike | None = None,
    ) -> BatchInputs:
        """Make a batch of token ids or embeddings; arguments and errors are those of ``Deployment.run``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("give either input_ids or inputs_embeds, not both and not neither")
        if images is not None and (input_ids is None or modality is not None):
            raise RequestError(
                "images go with input_ids, whose placeholders say where they are: leave inputs_embeds and modality out"
            )
        if inputs_embeds is not None:
            embeds = check_embeds(inputs_embeds, self._base)
            indices = check_modality(modality, embeds.shape[:2], self._base)
            mapping = self._tasks.resolve(tasks, len(embeds))
            if mapping.needs_ids:
                raise RequestError("a task of these rows looks token ids up, so embeddings do not do: pass input_ids")
            types = check_token_types(token_type_ids, embeds.shape[:2], self._base)
            return BatchInputs(None, embeds, indices, mapping, types=types)
        assert input_ids is not None
        ids = check_input_ids(input_ids, self._base)
        indices = check_modality(modality, (ids.shape[0], ids.shape[1]), self._base)
        mapping = self._tasks.resolve(tasks, len(ids))
        types = check_token_types(token_type_ids, (ids.shape[0], ids.shape[1]), self._base)
        return BatchInputs(ids, None, indices, mapping, self._embed_images(ids, images), types)

    def resolve_rows(self, tasks: Tasks, batch: int) -> list[tuple[str | None, AdapterMapping]]:
        """See ``TaskRegistry.resolve_rows``."""
        return self._tasks.resolve_rows(tasks, batch)

    def lay_out(self, inputs: BatchInputs, attention_mask: npt.ArrayLike | None) -> SoftPromptLayout:
        """Layout of a batch with its soft prompts; raises ``RequestError`` if it is too long, and as ``generate``."""
        mask = check_mask(attention_mask, inputs.shape)
        layout = SoftPromptLayout(mask, inputs.tasks.soft_prompts(len(mask)), self._padding_side)
        check_length(layout.mask.shape[1], self._base)
        for row, kv_prefix in enumerate(inputs.tasks.kv_prefixes(len(mask))):
            if kv_prefix is not None:
                self._check_kv_prefix(kv_prefix)
                check_length(len(kv_prefix) + int(layout.mask[row].sum()), self._base)
        return layout

    def encode_prompt(self, prompt: str, task: str | None, images: int) -> list[int]:
        """See ``Deployment.encode_prompt``."""
        return self._tokenize(prompt, False, images, self._tasks.resolve(task, 1).kv_prefix)

    def _kv_prefix(self, mapping: AdapterMapping) -> KvPrefix | None:
        """The KV prefix of a task's mapping, checked."""
        if mapping.kv_prefix is not None:
            self._check_kv_prefix(mapping.kv_prefix)
        return mapping.kv_prefix

    def _limit(self, max_new_tokens: int | None, positions: int) -> int:
        """Most new tokens after a prompt of ``positions``; raises ``RequestError`` if prompt and reply do not fit.

        It is the request's, else the base's default as far as it fits.
        """
        base, generation = self._base, self._base.generation
        is_separate = base.kind == "encoder-decoder"  # encoder and decoder number positions separately
        limit = max_new_tokens
        if limit is None:
            wanted = (generation and generation.max_new_tokens) or MAX_NEW_TOKENS
            taken = 0 if is_separate else positions
            bounds = (base.max_positions, self._capacity, self._context)
            limits = [bound - taken for bound in bounds if bound is not None]
            limit = max(1, min([wanted, *limits]))
        total = max(positions, limit) if is_separate else positions + limit
        check_length(total, base)
        if self._context is not None and total > self._context:
            raise RequestError(
                f"prompt and reply would have {total} positions, the deployment was opened with context="
                f"{self._context}: shorten the prompt, ask for fewer new tokens, or open it with a larger context"
            )
        return limit

    def _tokenize(
        self, prompt: str | list[int], chat: bool | ChatOptions, images: int, kv_prefix: KvPrefix | None
    ) -> list[int]:
        """Token ids of a checked prompt; ``images`` is its number of images, ``kv_prefix`` what it follows."""
        if isinstance(prompt, str):
            if options := as_options(chat):
                return self.tokenizer.encode_chat(prompt, options)
            if kv_prefix is not None and kv_prefix.spec.continues_text:
                return self.tokenizer.encode_plain(prompt)
            return self.tokenizer.encode(prompt, images)
        if chat:
            raise RequestError("chat is for texts: put the template's tokens into the prompt, or pass a text")
        return prompt

    def _embed_images(self, ids: Array, images: Images) -> list[list[ImageEmbeds]] | None:
        """Embeddings of the images of each row; ``None`` if there are none."""
        row_images = check_images(images, len(ids), self._base)
        if self._base.vision is None or images is None:
            return None
        prepared = self._vision.prepare(row_images) if any(row_images) else [[] for _ in row_images]
        check_expanded(ids, prepared, self._base.vision)
        return self._vision.embed(prepared) if any(row_images) else None
