"""A deployment, open: one engine, many tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy.typing as npt

from adalink.runtime.arrays import Array
from adalink.runtime.backends import open_backend
from adalink.runtime.base_model import Given, OpenBase
from adalink.runtime.engine import Backend
from adalink.runtime.errors import RequestError
from adalink.runtime.generation.loop import Generation, SequenceState, Stream, check_stops, decode
from adalink.runtime.generation.padding import pad_left
from adalink.runtime.generation.prompt_lookup import DRAFT_TOKENS
from adalink.runtime.generation.sampling import Sampling
from adalink.runtime.logs import get_logger
from adalink.runtime.receipt import Receipt
from adalink.runtime.request import (
    Prompts,
    Tasks,
    check_embeds,
    check_input_ids,
    check_length,
    check_mask,
    check_modality,
    check_prompts,
    check_whole,
)
from adalink.runtime.storage.integrity import read_verified, verify_files
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.variants import choose_variant
from adalink.runtime.storage.verification_cache import verify_once
from adalink.runtime.storage.vision_schema import Grid
from adalink.runtime.tasks.registry import TaskTable
from adalink.runtime.tasks.soft_prompt import SoftPromptLayout
from adalink.runtime.text.tokenizer import Tokenizer
from adalink.runtime.vision.placeholders import ImageEmbeds, Images, check_expanded, check_images, expand
from adalink.runtime.vision.tower import OpenVision

if TYPE_CHECKING:
    from adalink.runtime.profile import Profile

IMAGE_CACHE_BYTES = 256 << 20

_LOG = get_logger(__name__)


class Deployment:
    r"""An open deployment; a context manager, safe for calls from several threads.

    Attributes:
        path: the folder.
        manifest: what it holds, as it was when it was opened.
        variant: the form of the base that is run.

    Example::

        with Deployment.open("smollm2") as deployment:
            print(deployment.generate(["Text: oil prices rose\nTopic:"], tasks="reuters-r8")[0].text)
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        backend: Backend,
        variant: str | None = None,
        *,
        task_memory_bytes: int | None = None,
        prefix_cache_bytes: int = 0,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.variant = manifest.variants[choose_variant(manifest, backend.name, variant)]
        self._base = manifest.base
        self._tasks = TaskTable(path, manifest, backend, task_memory_bytes)
        self._opened = OpenBase(path, manifest, self.variant, backend, prefix_cache_bytes)
        self._vision = OpenVision(path, manifest, self.variant, backend, image_cache_bytes)
        self._tokenizer: Tokenizer | None = None
        self._is_closed = False

    @classmethod
    def open(
        cls,
        path: str | Path,
        backend: str = "onnxruntime-cpu",
        *,
        variant: str | None = None,
        threads: int | None = None,
        full_check: bool = False,
        task_memory_bytes: int | None = None,
        prefix_cache_bytes: int = 0,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
    ) -> Deployment:
        """Check the files of a deployment's base against its manifest and open its engine, once.

        A task's files are checked when it is loaded, those of the tokenizer and of the vision tower when first used.

        Args:
            path: the deployment folder.
            backend: which engine; see ``adalink doctor``.
            variant: which form of the base, such as ``"int4"``; by default one that is not quantised, if there is one
                (`adalink.runtime.storage.variants`).
            threads: threads of the engine; all physical cores by default.
            full_check: read every byte of every file, those of all tasks included. Without it, files that this user
                has checked before and that have not changed since are not read again
                (`adalink.runtime.storage.verification_cache`).
            task_memory_bytes: weights of tasks that are held at a time; beyond it the task that was not used for the
                longest time is let go until it is asked for again. No limit by default: the weights of the deployment's
                tasks are mapped files, whose pages the system takes back when memory is short.
            prefix_cache_bytes: memory for what prompts left in the KV cache; ``generate`` goes on from the longest
                beginning that a prompt has in common with an earlier one under the same adapter. 0 keeps nothing.
            image_cache_bytes: memory for embeddings of images, which serve every task; 0 keeps nothing between calls.

        Raises:
            RequestError: ``threads`` or ``task_memory_bytes`` is less than 1, ``prefix_cache_bytes`` or
                ``image_cache_bytes`` less than 0, or the former not 0 for a base that cannot go on from a kept prefix.
            DeploymentError: the folder is no deployment, or (``ManifestError``, ``IntegrityError``) not a whole one.
            BackendError: the backend is not on this machine, the deployment does not have the variant, or it refused.
        """
        begun, folder = time.perf_counter(), Path(path)
        manifest = read_manifest(folder)
        if task_memory_bytes is not None and task_memory_bytes < 1:
            raise RequestError(f"task_memory_bytes is {task_memory_bytes}, expected at least 1")
        for name, size in (("prefix_cache_bytes", prefix_cache_bytes), ("image_cache_bytes", image_cache_bytes)):
            if size < 0:
                raise RequestError(f"{name} is {size}, expected at least 0, which keeps nothing")
        opened = open_backend(backend, threads)
        chosen = choose_variant(manifest, opened.name, variant)
        if full_check:
            verify_files(folder, manifest)
        else:
            own = manifest.variants[chosen]
            verify_once(folder, manifest, (manifest.base.embeddings, *(() if own.is_compiled else own.files)))
            if own.is_compiled:  # a plan is code: it is read whole, whatever this user has seen before
                verify_files(folder, manifest, own.files)
        deployment = cls(
            folder,
            manifest,
            opened,
            chosen,
            task_memory_bytes=task_memory_bytes,
            prefix_cache_bytes=prefix_cache_bytes,
            image_cache_bytes=image_cache_bytes,
        )
        spent_ms = (time.perf_counter() - begun) * 1000
        _LOG.info("opened %s: variant %s, backend %s, %.0f ms", folder, chosen, opened.name, spent_ms)
        return deployment

    def __enter__(self) -> Deployment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the engine's memory back; later calls that compute or load anything are refused."""
        self._is_closed = True
        self._opened.close()
        self._vision.close()

    @property
    def images_encoded(self) -> int:
        """Images that the vision tower has been run on since the deployment was opened."""
        return self._vision.encoded

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that can be run, sorted."""
        return self._tasks.names

    @property
    def profile(self) -> Profile | None:
        """Shapes that the engine takes, where they are limited."""
        return self._opened.engine.profile

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer; raises ``RequestError`` if the deployment has none."""
        if self._tokenizer is None:
            if self._base.tokenizer is None:
                raise RequestError(f"{self._base.name} was exported without a tokenizer: pass input_ids to run()")
            template = self._base.chat_template
            text = None if template is None else read_verified(self.path, self.manifest, template).decode("utf-8")
            data = read_verified(self.path, self.manifest, self._base.tokenizer)
            self._tokenizer = Tokenizer(data, text, self._base)
        return self._tokenizer

    def run(
        self,
        *,
        input_ids: npt.ArrayLike | None = None,
        inputs_embeds: npt.ArrayLike | None = None,
        attention_mask: npt.ArrayLike | None = None,
        modality: npt.ArrayLike | None = None,
        tasks: Tasks = None,
        images: Images = None,
        decoder_input_ids: npt.ArrayLike | None = None,
    ) -> dict[str, Array]:
        """Run the base once over whole sequences, each a prompt: PaliGemma's attend in both directions.

        A task's soft prompt stands before the first token of its rows: what is passed and returned are the caller's own
        positions, and the soft prompt counts towards the longest sequence.

        Args:
            input_ids: token ids with shape ``(batch, seq)``; or else
            inputs_embeds: embeddings with shape ``(batch, seq, d)``, to be adapted, in the base's dtype.
            attention_mask: 1 for tokens and 0 for padding, ``(batch, seq)``; all tokens by default. Decoders may be
                padded on either side; encoders, which number their positions from the left, on the right.
            modality: index in the base's modalities for each position, -1 for none; all text by default.
            tasks: one task for all rows, or one for each row; ``None`` is the base model.
            images: for each row its images or ``None``, as in ``generate``; ``input_ids`` has a placeholder for every
                position that they take up. Without it placeholders are tokens like any other.
            decoder_input_ids: decoder tokens of an encoder-decoder, ``(batch, decoder seq)``.

        Returns:
            ``logits`` with shape ``(batch, seq, vocab)`` or ``last_hidden_state`` with shape ``(batch, seq, d)``; of an
            encoder-decoder the encoder's, and with ``decoder_input_ids`` also ``logits``.

        Raises:
            RequestError: the input is not one the base can take; ``UnknownTaskError`` for a task not deployed.
            BackendError: the engine refused.
        """
        given = self._given(input_ids, inputs_embeds, modality, tasks, images)
        layout = self._lay_out(given, check_mask(attention_mask, given.shape))
        check_length(layout.mask.shape[1], self._base)
        return self._opened.run(given, layout, decoder_input_ids)

    def embed(
        self,
        input_ids: npt.ArrayLike | None = None,
        *,
        inputs_embeds: npt.ArrayLike | None = None,
        tasks: Tasks = None,
        modality: npt.ArrayLike | None = None,
        images: Images = None,
    ) -> Array:
        """Adapted embeddings with shape ``(batch, seq, d)``: what ``run`` feeds the engine, of any length.

        They are those of the positions given: a soft prompt, which ``run`` puts before them, is not among them.

        Takes and raises what ``run`` does.
        """
        given = self._given(input_ids, inputs_embeds, modality, tasks, images)
        return self._opened.engine.embedder.read(self._opened.adapt(given))

    def encode(self, pixel_values: Array, grid: Grid | None = None) -> Array:
        """What the vision tower gives for prepared images, before any task; nothing of it is kept.

        Args:
            pixel_values: float32 with shape ``(images, 3, height, width)``, tiles counting as images; of a base whose
                images keep their shape the patches of one, ``(patches, numbers)``.
            grid: rows and columns of pieces of that one.

        Returns:
            float32 with shape ``(images, tokens_per_image, d)``, or ``(positions, d)``.

        Raises:
            RequestError: the base takes no images, or none of this size.
            BackendError: what runs the tower is not there, or refused.
        """
        return self._vision.encode(pixel_values, grid)

    def generate(
        self,
        prompts: Prompts,
        *,
        images: Images = None,
        tasks: Tasks = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = (),
        stream: Stream | None = None,
        chat: bool = False,
        draft_tokens: int | None = None,
    ) -> list[Generation]:
        """Continue each prompt, all in one batch.

        Args:
            prompts: the texts, or the token ids of each.
            images: for each prompt a list of its images, or ``None``; the prompt has the model's placeholder, such as
                ``<image>``, once for each where it belongs; PaliGemma's may do without, then images go in front. An
                image is a path, the bytes of a file, a Pillow image or a uint8 array (`adalink.runtime.vision.images`).
            tasks: one task for all prompts, or one for each; ``None`` is the base model.
            max_new_tokens: tokens a prompt at most; with the prompt and its soft prompt no more than the model allows.
            temperature: 0 takes the likeliest token each time.
            top_k: see ``adalink.runtime.generation.sampling.Sampling``.
            top_p: likewise.
            seed: makes sampling repeatable.
            stop: texts that end a row; they are not part of its text.
            stream: called with the row and each new piece of its text.
            chat: put each prompt into the model's chat template as a user's message.
            draft_tokens: a single prompt, or the last of a batch, goes on by up to so many guesses from its own text
                (`adalink.runtime.generation.prompt_lookup`) that one pass checks: the text is the same, sooner. Only
                decoders exported with ``--target onnxruntime-cpu`` can. By default 8 in float32, and 0, token by
                token, where a pass over several tokens rounds otherwise than a step does: quantised, or in 16 bits.

        Raises:
            RequestError: a prompt is empty or too long, a setting is wrong, the base is an encoder, an image is none,
                or a prompt has not as many placeholders as images.
            BackendError: the engine refused.
        """
        self._check_open()
        base = self._base
        if base.kind == "encoder":
            raise RequestError(f"{base.name} is an encoder and generates no text: call run()")
        asked = check_prompts(prompts, base)
        check_whole(max_new_tokens, "max_new_tokens", 1)
        if draft_tokens is None:
            is_exact = base.embedding_dtype == "float32" and self.variant.quantization is None
            draft_tokens = DRAFT_TOKENS if is_exact else 0
        else:
            check_whole(draft_tokens, "draft_tokens", 0)
        sampling = Sampling(temperature, top_k, top_p, seed)
        stops = check_stops(stop)
        selection = self._tasks.resolve(tasks, len(asked))
        pictures = check_images(images, len(asked), base)
        tokenizer = self.tokenizer
        written = [self._encode(prompt, chat, len(own)) for prompt, own in zip(asked, pictures, strict=True)]
        prepared = self._vision.prepare(pictures) if any(pictures) else [[] for _ in asked]
        encoded = [expand(tokens, prepared[row], row, base) for row, tokens in enumerate(written)]
        for index, tokens in enumerate(encoded):
            if not tokens:
                raise RequestError(f"prompt {index} has no tokens: give it some text")
        ids, mask = pad_left(encoded, base.pad_token_id)
        given = Given(check_input_ids(ids, base), None, None, selection)
        layout = self._lay_out(given, mask)
        positions = layout.mask.shape[1]
        check_length(
            max(positions, max_new_tokens) if base.kind == "encoder-decoder" else positions + max_new_tokens, base
        )
        eos = frozenset(base.eos_token_ids)
        rows = [SequenceState(index, tokens, tokenizer, stops, eos, stream) for index, tokens in enumerate(encoded)]
        if any(pictures):
            given = replace(given, images=self._vision.embed(prepared))
        decoding, embedder, adapting = self._opened.start(encoded, given, layout, max_new_tokens)
        try:
            decode(decoding, embedder, adapting, rows, sampling, max_new_tokens, draft_tokens)
        finally:
            decoding.close()
        return [row.finish() for row in rows]

    def load_task(self, name: str) -> None:
        """Load a task ahead of its first use; raises ``UnknownTaskError``, or ``IntegrityError`` for altered files."""
        self._check_open()
        self._tasks.get(name)

    def unload_task(self, name: str) -> None:
        """Give back the memory of a task; its next use loads it again. Raises ``UnknownTaskError``."""
        self._tasks.unload(name)

    def add_task(self, path: str | Path, name: str | None = None) -> str:
        """Add a task from an adapter folder, in this process only; the deployment folder is not changed.

        The adapter is read now, and again from the same folder if its memory was given back meanwhile.

        Args:
            path: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
            name: the task's name; the folder's by default.

        Returns:
            The name.

        Raises:
            AdapterError: the folder is no whole adapter.
            ContractError: the adapter belongs to another base.
            RequestError: a task of that name is there already.
        """
        self._check_open()
        return self._tasks.add(Path(path), name)

    def remove_task(self, name: str) -> None:
        """Forget a task, in this process only; raises ``UnknownTaskError``."""
        self._tasks.remove(name)

    def receipt(self) -> Receipt:
        """Count the engines built and read the base's files again; see ``Receipt``."""
        return self._opened.receipt()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RequestError("the deployment is closed: open it again")

    def _encode(self, prompt: str | list[int], chat: bool, images: int) -> list[int]:
        """Token ids of a checked prompt with so many images."""
        if isinstance(prompt, str):
            return self.tokenizer.encode_chat(prompt) if chat else self.tokenizer.encode(prompt, images)
        if chat:
            raise RequestError("chat is for texts: put the template's tokens into the prompt, or pass a text")
        return prompt

    def _lay_out(self, given: Given, mask: Array) -> SoftPromptLayout:
        """Where the positions of a request stand behind the soft prompts of their rows."""
        return SoftPromptLayout(mask, given.tasks.soft_prompts(len(mask)), self._base)

    def _given(
        self,
        input_ids: npt.ArrayLike | None,
        inputs_embeds: npt.ArrayLike | None,
        modality: npt.ArrayLike | None,
        tasks: Tasks,
        images: Images,
    ) -> Given:
        """A request, checked."""
        self._check_open()
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("give either input_ids or inputs_embeds, not both and not neither")
        if images is not None and (input_ids is None or modality is not None):
            raise RequestError(
                "images go with input_ids, whose placeholders say where they are: leave inputs_embeds and modality out"
            )
        if inputs_embeds is not None:
            embeds = check_embeds(inputs_embeds, self._base)
            indices = check_modality(modality, embeds.shape[:2], self._base)
            selection = self._tasks.resolve(tasks, len(embeds))
            if selection.needs_ids:
                raise RequestError("a task of these rows looks token ids up, so embeddings do not do: pass input_ids")
            return Given(None, embeds, indices, selection)
        assert input_ids is not None
        ids = check_input_ids(input_ids, self._base)
        indices = check_modality(modality, (ids.shape[0], ids.shape[1]), self._base)
        return Given(ids, None, indices, self._tasks.resolve(tasks, len(ids)), self._seen(ids, images))

    def _seen(self, ids: Array, images: Images) -> list[list[ImageEmbeds]] | None:
        """Embeddings of the images of each row; ``None`` if there are none."""
        pictures = check_images(images, len(ids), self._base)
        if self._base.vision is None or images is None:
            return None
        prepared = self._vision.prepare(pictures) if any(pictures) else [[] for _ in pictures]
        check_expanded(ids, prepared, self._base.vision)
        return self._vision.embed(prepared) if any(pictures) else None
