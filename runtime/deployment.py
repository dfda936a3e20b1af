"""A deployment, open: one engine, many tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy.typing as npt

from adalink.runtime.arrays import Array
from adalink.runtime.backends import open_backend
from adalink.runtime.engine import Backend
from adalink.runtime.errors import RequestError
from adalink.runtime.generation.loop import decode
from adalink.runtime.generation.sampling import SamplingParams
from adalink.runtime.generation.sequence import Generation, SequenceState, Stream, check_stops
from adalink.runtime.generation.speculative_decoding import DRAFT_TOKENS
from adalink.runtime.input_processor import InputProcessor
from adalink.runtime.logs import get_logger
from adalink.runtime.model_runner import ModelRunner
from adalink.runtime.options import IMAGE_CACHE_BYTES, OpenOptions
from adalink.runtime.receipt import Receipt
from adalink.runtime.request import Prompts, Tasks, check_whole
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.variants import choose_variant
from adalink.runtime.storage.verification_cache import verify_once
from adalink.runtime.storage.vision_schema import Grid
from adalink.runtime.tasks.registry import TaskTable
from adalink.runtime.text.tokenizer import Tokenizer
from adalink.runtime.vision.placeholders import Images
from adalink.runtime.vision.tower import OpenVision

if TYPE_CHECKING:
    from adalink.runtime.profile import Profile

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

    def __init__(self, path: Path, manifest: Manifest, backend: Backend, options: OpenOptions | None = None) -> None:
        options = options or OpenOptions()
        self.path = path
        self.manifest = manifest
        self.variant = manifest.variants[choose_variant(manifest, backend.name, options.variant)]
        self._tasks = TaskTable(path, manifest, backend, options.task_memory_bytes)
        self._runner = ModelRunner(path, manifest, self.variant, backend, options.prefix_cache_bytes)
        self._vision = OpenVision(path, manifest, self.variant, backend, options.image_cache_bytes)
        self._inputs = InputProcessor(path, manifest, self._tasks, self._vision, self._runner.engine.padding_side)
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
            variant: which form of the base, such as ``"int4"``; see ``adalink.runtime.options.OpenOptions``.
            threads: threads of the engine; all physical cores by default.
            full_check: read every byte of every file, those of all tasks included.
            task_memory_bytes: adapter weights that are held at a time; no limit by default.
            prefix_cache_bytes: memory of the prefix cache; 0 keeps nothing.
            image_cache_bytes: memory for embeddings of images; 0 keeps nothing between calls.

        Raises:
            RequestError: ``threads`` or ``task_memory_bytes`` is less than 1, ``prefix_cache_bytes`` or
                ``image_cache_bytes`` less than 0, or the former not 0 for a base that cannot go on from a kept prefix.
            DeploymentError: the folder is no deployment, or (``ManifestError``, ``IntegrityError``) not a whole one.
            BackendError: the backend is not on this machine, the deployment does not have the variant, or it refused.
        """
        begun, folder = time.perf_counter(), Path(path)
        manifest = read_manifest(folder)
        options = OpenOptions(variant, threads, full_check, task_memory_bytes, prefix_cache_bytes, image_cache_bytes)
        opened = open_backend(backend, threads)
        name = choose_variant(manifest, opened.name, variant)
        chosen = manifest.variants[name]
        if full_check:
            verify_files(folder, manifest)
        else:
            verify_once(folder, manifest, (manifest.base.embeddings, *(() if chosen.is_compiled else chosen.files)))
            if chosen.is_compiled:  # a plan is code: it is read whole, whatever this user has seen before
                verify_files(folder, manifest, chosen.files)
        deployment = cls(folder, manifest, opened, options)
        spent_ms = (time.perf_counter() - begun) * 1000
        _LOG.info("opened %s: variant %s, backend %s, %.0f ms", folder, name, opened.name, spent_ms)
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
        self._runner.close()
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
        return self._runner.engine.profile

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer; raises ``RequestError`` if the deployment has none."""
        return self._inputs.tokenizer

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
        self._check_open()
        inputs = self._inputs.process_arrays(input_ids, inputs_embeds, modality, tasks, images)
        return self._runner.run(inputs, self._inputs.lay_out(inputs, attention_mask), decoder_input_ids)

    def input_embeddings(
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
        self._check_open()
        inputs = self._inputs.process_arrays(input_ids, inputs_embeds, modality, tasks, images)
        return self._runner.engine.embedder.read(self._runner.input_embeddings(inputs))

    def encode_images(self, pixel_values: Array, grid: Grid | None = None) -> Array:
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
        sampling: SamplingParams | None = None,
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
            sampling: how tokens are chosen; by default the likeliest token each time.
            stop: texts that end a row; they are not part of its text.
            stream: called with the row and each new piece of its text.
            chat: put each prompt into the model's chat template as a user's message.
            draft_tokens: speculative decoding of a single prompt, or of the last one of a batch: so many draft tokens
                at most are looked up in its own text (`adalink.runtime.generation.speculative_decoding`) and verified
                in one pass. The text is the same, sooner. Only decoders exported with ``--target onnxruntime-cpu``
                can. By default 8 in float32, and 0, token by token, where a pass over several tokens rounds otherwise
                than a step does: quantised, or in 16 bits.

        Raises:
            RequestError: a prompt is empty or too long, a setting is wrong, the base is an encoder, an image is none,
                or a prompt has not as many placeholders as images.
            BackendError: the engine refused.
        """
        self._check_open()
        base, sampling, stops = self.manifest.base, sampling or SamplingParams(), check_stops(stop)
        if base.kind == "encoder":
            raise RequestError(f"{base.name} is an encoder and generates no text: call run()")
        check_whole(max_new_tokens, "max_new_tokens", 1)
        if draft_tokens is None:
            draft_tokens = DRAFT_TOKENS if self._is_float32 else 0
        check_whole(draft_tokens, "draft_tokens", 0)
        batch = self._inputs.process_prompts(prompts, images, tasks, chat=chat, max_new_tokens=max_new_tokens)
        tokenizer, eos = self.tokenizer, frozenset(base.eos_token_ids)
        rows = [SequenceState(row, ids, tokenizer, stops, eos, stream) for row, ids in enumerate(batch.tokens)]
        state, embedder, mapping = self._runner.start(batch.inputs, batch.layout, max_new_tokens)
        try:
            decode(state, embedder, mapping, rows, sampling, max_new_tokens, draft_tokens)
        finally:
            state.close()
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
        return self._runner.receipt()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RequestError("the deployment is closed: open it again")

    @property
    def _is_float32(self) -> bool:
        """Whether the engine computes in float32 throughout, so that a pass over several tokens rounds as steps do."""
        return self.manifest.base.embedding_dtype == "float32" and self.variant.quantization is None
