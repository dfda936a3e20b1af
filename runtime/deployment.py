"""An open deployment: one engine, many tasks.

The file is long because ``Deployment`` holds all that programs call, and documents it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adalink.runtime.arguments import check_flag, check_kind, check_name, check_path
from adalink.runtime.arrays import Array
from adalink.runtime.backends import open_backend
from adalink.runtime.engine import Backend
from adalink.runtime.errors import RequestError
from adalink.runtime.finite import check_outputs
from adalink.runtime.generation.handle import Handle
from adalink.runtime.generation.prompt import collate
from adalink.runtime.generation.request import Request
from adalink.runtime.generation.sequence import Generation, Stream
from adalink.runtime.input_processor import InputProcessor
from adalink.runtime.label_scorer import LabelScorer
from adalink.runtime.logs import get_logger
from adalink.runtime.model_runner import ModelRunner
from adalink.runtime.options import IMAGE_CACHE_BYTES, OpenOptions
from adalink.runtime.receipt import Receipt
from adalink.runtime.request import Prompts, Tasks
from adalink.runtime.sampling.sampler import SamplingParams
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.variants import choose_variant
from adalink.runtime.storage.verification_cache import verify_variant
from adalink.runtime.storage.vision_schema import Grid
from adalink.runtime.tasks.registry import TaskRegistry
from adalink.runtime.tasks.reloader import TaskReloader
from adalink.runtime.tasks.task_changes import Reload
from adalink.runtime.text.messages import ChatOptions, Messages
from adalink.runtime.text.tokenizer import Tokenizer
from adalink.runtime.text_classifier import Classification, TextClassifier, Texts
from adalink.runtime.text_encoder import TextEncoder
from adalink.runtime.text_generator import TextGenerator
from adalink.runtime.vision.placeholders import Images
from adalink.runtime.vision.tower import OpenVision

if TYPE_CHECKING:
    from adalink.runtime.profile import Profile

_LOG = get_logger(__name__)


class Deployment:
    r"""An open deployment; a context manager, safe for calls from several threads.

    Attributes:
        path: the folder.
        variant: the base variant that the engine runs.

    Example::

        with Deployment.open("smollm2") as deployment:
            print(deployment.generate(["Text: oil prices rose\nTopic:"], tasks="reuters-r8")[0].text)
    """

    def __init__(self, path: Path, manifest: Manifest, backend: Backend, options: OpenOptions | None = None) -> None:
        options = options or OpenOptions()
        self.path = path
        self.variant = manifest.variants[choose_variant(manifest, backend.name, options.variant)]
        self._tasks = TaskRegistry(path, manifest, backend, options.task_memory_bytes)
        self._reloader = TaskReloader(path, self._tasks, self.variant, full_check=options.full_check)
        self._runner = ModelRunner(path, manifest, self.variant, backend, options)
        self._vision = OpenVision(path, manifest, self.variant, backend, options.image_cache_bytes)
        self._inputs = InputProcessor(
            path,
            manifest,
            self._tasks,
            self._vision,
            self._runner.engine,
            self._runner.check_kv_prefix,
            options.context,
        )
        self._generator = TextGenerator(manifest, self.variant, self._inputs, self._runner, options)
        self._encoder = TextEncoder(manifest.base, self._inputs, self._runner)
        scorer = LabelScorer(manifest.base, self._inputs, self._runner)
        self._classifier = TextClassifier(manifest.base, self._inputs, self._encoder, scorer)
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
        slots: int | None = None,
        context: int | None = None,
        queue_limit: int | None = None,
        kv_cache_dtype: str | None = None,
        gpu_layers: int | None = None,
    ) -> Deployment:
        """Verify the base's files against the manifest and open its engine, once.

        Other files are verified at their first use. See ``adalink.runtime.options.OpenOptions`` for the options.

        Args:
            path: the deployment folder.
            backend: the engine; see ``adalink doctor``.
            variant: base variant, such as ``"int4"``; by default one that is not quantised.
            threads: threads of the engine; all physical cores by default.
            full_check: read every byte of every file, all tasks included.
            task_memory_bytes: limit of loaded adapter weights; none by default.
            prefix_cache_bytes: size of the prefix cache; 0 turns it off.
            image_cache_bytes: size of the cache of image embeddings; 0 turns it off.
            slots: most requests that decode together; 64 by default.
            context: most positions of a request; memory for all slots is then taken once.
            queue_limit: most requests that wait; any number by default.
            kv_cache_dtype: ``"int8"`` for a KV cache of a quarter of the size, where the variant has a graph for it.
            gpu_layers: layers whose weights llama.cpp puts on a GPU; none by default. Not tried on one yet.

        Raises:
            RequestError: an option is out of range or no such value, or the base does not support a prefix cache.
            DeploymentError: not a deployment, or (``ManifestError``, ``IntegrityError``) a damaged one.
            BackendError: backend or variant is not available, or the engine refused.
            GraphError: a graph refers to files that the manifest does not list with it.
        """
        begun, folder = time.perf_counter(), check_path(path, "path")
        options = OpenOptions(
            variant,
            threads,
            full_check,
            task_memory_bytes,
            prefix_cache_bytes,
            image_cache_bytes,
            slots,
            context,
            queue_limit,
            kv_cache_dtype,
            gpu_layers,
        )
        manifest = read_manifest(folder)
        opened = open_backend(check_name(backend, "backend"), threads, gpu_layers)
        name = choose_variant(manifest, opened.name, variant)
        verified = verify_variant(folder, manifest, manifest.variants[name], full_check=full_check)
        deployment = cls(folder, manifest, opened, options)
        verified.check_unchanged(undo=deployment.close)
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
        """Free the engine; requests under way and later ones raise ``RequestError``."""
        self._is_closed = True
        self._generator.scheduler.close()
        self._runner.close()
        self._vision.close()

    @property
    def manifest(self) -> Manifest:
        """Its manifest, as it was opened with or last reloaded."""
        return self._tasks.manifest

    @property
    def images_encoded(self) -> int:
        """Images that the vision tower has encoded since the deployment was opened."""
        return self._vision.encoded

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the deployed tasks, sorted."""
        return self._tasks.names

    @property
    def running(self) -> int:
        """Requests that decode now."""
        return self._generator.scheduler.running

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in the running batch."""
        return self._generator.scheduler.waiting

    @property
    def profile(self) -> Profile | None:
        """Shapes that the engine takes; ``None`` if any."""
        return self._runner.engine.profile

    @property
    def takes_prefix_cache(self) -> bool:
        """Whether it can be opened with ``prefix_cache_bytes``."""
        return self._runner.slot_engine is not None

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
        token_type_ids: npt.ArrayLike | None = None,
    ) -> dict[str, Array]:
        """Forward pass over whole sequences, each a prompt: PaliGemma's attend in both directions.

        A task's soft prompt is prepended inside and stripped from the output. It counts towards the longest sequence.

        Args:
            input_ids: token ids with shape ``(batch, seq)``; or else
            inputs_embeds: embeddings before the adapter, shape ``(batch, seq, d)``, in the base's dtype.
            attention_mask: 1 for tokens, 0 for padding, ``(batch, seq)``; default all 1. Encoders: pad on the right.
            modality: index in the base's modalities for each position, -1 for none; all text by default.
            tasks: one task for all rows, or one for each row; ``None`` is the base model.
            images: for each row its images or ``None``, as in ``generate``; ``input_ids`` then has a placeholder for
                every position of an image. Without ``images``, placeholders are ordinary tokens.
            decoder_input_ids: decoder tokens of an encoder-decoder, ``(batch, decoder seq)``.
            token_type_ids: 0 for the first text of a pair and 1 for the second, ``(batch, seq)``; default all 0.

        Returns:
            Decoder: ``logits``, ``(batch, seq, vocab)``. Encoder, also of an encoder-decoder: ``last_hidden_state``,
            ``(batch, seq, d)``. With ``decoder_input_ids`` also ``logits``.

        Raises:
            RequestError: the base cannot take this input; ``UnknownTaskError`` for a task not deployed.
            BackendError: the engine refused, or its outputs are not numbers.
        """
        self._check_open()
        inputs = self._inputs.process_arrays(input_ids, inputs_embeds, modality, tasks, images, token_type_ids)
        layout = self._inputs.lay_out(inputs, attention_mask)
        outputs = self._runner.run(inputs, layout, decoder_input_ids)
        return check_outputs(outputs, layout.text_mask, tasks, is_decoder=self.manifest.base.kind == "decoder")

    def input_embeddings(
        self,
        input_ids: npt.ArrayLike | None = None,
        *,
        inputs_embeds: npt.ArrayLike | None = None,
        tasks: Tasks = None,
        modality: npt.ArrayLike | None = None,
        images: Images = None,
    ) -> Array:
        """Adapted input embeddings, ``(batch, seq, d)``: what ``run`` feeds the engine, without soft prompts.

        Arguments and errors are those of ``run``; the length is not limited.
        """
        self._check_open()
        inputs = self._inputs.process_arrays(input_ids, inputs_embeds, modality, tasks, images)
        return self._runner.engine.embedder.read(self._runner.input_embeddings(inputs))

    def kv_prefix(self, task: str) -> Array | None:
        """Keys and values with which rows of a task begin; ``None`` for a task without a KV prefix.

        Their shape is ``(2 * layers, kv_heads, n, head_dim)``: key and value of each layer in turn. Do not write to
        them. Raises ``UnknownTaskError``.
        """
        self._check_open()
        _, mapping = self._inputs.resolve_rows(task, 1)[0]
        return None if mapping.kv_prefix is None else mapping.kv_prefix.states

    def read_states(self, prompt: str | list[int]) -> Array:
        """Keys and values of a prompt under the base model, shaped as those of ``kv_prefix``.

        Args:
            prompt: a text, or token ids.

        Raises:
            RequestError: the prompt is too long, or has no tokens.
            ContractError: the base takes no KV prefix, for which these are.
            BackendError: the engine refused, or takes none.
        """
        self._check_open()
        prompts = self._inputs.process_prompts([prompt], None, None, chat=False, max_new_tokens=1)
        return self._runner.read_states(
            collate(prompts, self.manifest.base.pad_token_id, self._runner.engine.padding_side)
        )

    @property
    def text_encoder(self) -> TextEncoder:
        """What ``encode`` does, step by step: for programs that need tokens and vectors."""
        self._check_open()
        return self._encoder

    def encode(
        self,
        texts: Prompts,
        tasks: Tasks = None,
        *,
        prompt: str | None = None,
        pooling: str | Sequence[str] | None = None,
        normalize: bool | None = None,
    ) -> npt.NDArray[np.float32]:
        """Embeddings of texts: an encoder's states, pooled as in sentence-transformers.

        Defaults are those of the checkpoint's own sentence-transformers files. As there, a text that is longer than
        they allow is cut; a warning in the log counts such texts.

        Args:
            texts: texts, or token ids, special tokens included, which get no prompt and are never cut.
            tasks: one task for all texts, or one for each; ``None`` is the base model.
            prompt: put before each text; by default the files' own default prompt, ``""`` for none.
            pooling: one or several of ``"cls"``, ``"max"``, ``"mean"``, ``"mean_sqrt_len_tokens"``,
                ``"weightedmean"`` and ``"lasttoken"``; the vectors of several are concatenated.
            normalize: whether vectors are divided by their length.

        Returns:
            float32 with shape ``(texts, width)``; ``width`` is ``d`` times the number of poolings.

        Raises:
            RequestError: the base is a decoder, it says no pooling and none is given, a text has no tokens, or it is
                longer than the model takes and nothing says where to cut.
            BackendError: the engine refused, or its states are not numbers.
        """
        self._check_open()
        return self._encoder.encode(texts, tasks, prompt, pooling, normalize)

    @property
    def text_classifier(self) -> TextClassifier:
        """What ``classify`` does, step by step: for programs that need scores."""
        self._check_open()
        return self._classifier

    def classify(
        self,
        texts: Texts,
        tasks: Tasks = None,
        *,
        labels: Sequence[str] | None = None,
        calibration: str | None = None,
    ) -> list[Classification]:
        """Labels of texts, by tasks that were trained on rows with labels.

        On an encoder the task's head says the label. A text is cut to the length that the rows of the training could
        have; the result says so. On a base that generates, texts are prompts, as in training. The probability of a
        label is its share among the labels, by the log-likelihood of its tokens and an end token after the prompt. No
        other label is ever given, and a prompt that is too long is an error.

        Args:
            texts: texts, or pairs of texts.
            tasks: one task for all texts, or one for each: their labels may differ.
            labels: for a base that generates, completions to choose from; by default those of the task's training.
            calibration: likewise, a prompt without content, such as ``"Text: N/A Topic:"``. What the task says of it
                is divided out of the probabilities.

        Raises:
            RequestError: a task has no head and no labels, a text has no tokens, or a prompt is too long.
            UnknownTaskError: a task is not deployed.
            BackendError: the engine refused, or its states are not numbers.
        """
        return self.text_classifier.classify(texts, tasks, labels, calibration)

    def encode_images(self, pixel_values: Array, grid: Grid | None = None) -> Array:
        """Image embeddings of the vision tower, before any adapter; not cached.

        Args:
            pixel_values: float32, ``(images, 3, height, width)``, a tile counting as an image. For a base whose images
                keep their shape: the patches of one image, ``(patches, numbers)``.
            grid: rows and columns of pieces of that image.

        Returns:
            float32 with shape ``(images, tokens_per_image, d)``, or ``(positions, d)``.

        Raises:
            RequestError: the base takes no images, or none of this size.
            BackendError: the tower's engine is not available, or refused.
        """
        return self._vision.encode(pixel_values, grid)

    def generate(
        self,
        prompts: Prompts | None = None,
        *,
        messages: Messages | None = None,
        images: Images = None,
        tasks: Tasks = None,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] | None = None,
        stream: Stream | None = None,
        chat: bool | ChatOptions = False,
        draft_tokens: int | None = None,
    ) -> list[Generation]:
        """Generate a continuation of each prompt, together; ``submit`` and wait.

        Args:
            prompts: texts, or token ids; or else
            messages: one conversation, a list of messages such as ``{"role": "user", "content": "Hello"}``, or a list
                of conversations, in the model's chat template. A content may be a list of parts, as in OpenAI's API.
            images: for each prompt a list of its images, or ``None``. A prompt has one placeholder, such as
                ``<image>``, for each image; PaliGemma's may omit them, then images come first. An image is a path, the
                bytes of a file, a Pillow image or a uint8 array (`adalink.runtime.vision.images`).
            tasks: one task for all prompts, or one for each; ``None`` is the base model.
            max_new_tokens: most new tokens of a prompt, which must fit the model behind prompt and soft prompt; by
                default the base's own limit, else 64, or as many as fit.
            sampling: how tokens are chosen; by default as the base's ``generation_config.json`` says, else greedily.
            stop: texts that end a row, left out of its text; by default the base's own, an empty list for none.
            stream: called with the row and each new piece of its text.
            chat: apply the model's chat template, each prompt being a user message. ``ChatOptions`` says how, also for
                ``messages``.
            draft_tokens: most draft tokens of a pass (`adalink.runtime.generation.speculative_decoding`), for a single
                prompt or the last one left; needs ``--target onnxruntime-cpu``. By default 8 in float32, where the text
                is the same; else 0, since a pass over several tokens then rounds otherwise.

        Raises:
            RequestError: a prompt is empty or too long, a setting is out of range, the base is an encoder, an image
                cannot be read, or placeholders and images differ in number.
            BackendError: the engine refused, or its logits are not numbers.
        """
        self._check_open()
        check_kind(stream, "stream", Callable, "a function of a row and a text, or None")
        settings = Request(
            max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, chat=chat, draft_tokens=draft_tokens
        )
        return self._generator.generate(prompts, messages, images, tasks, settings, stream)

    def submit(self, request: Request) -> Handle:
        """Run one request beside all others; it joins the running batch at the next step.

        Engines on graphs with a cache in place (``--target onnxruntime-cpu``) take requests at any step. Others answer
        what waits together as one batch.

        Args:
            request: prompt, task and settings.

        Returns:
            A handle: iterate over it for the text as it comes, with ``for`` or ``async for``, or call ``result()``.

        Raises:
            QueueFullError: ``queue_limit`` requests wait already.
            RequestError: as for ``generate``.
        """
        self._check_open()
        check_kind(request, "request", Request, "a Request")
        return self._generator.submit(request)

    def encode_prompt(self, prompt: str, task: str | None = None, images: int = 0) -> list[int]:
        """Token ids of a prompt as ``generate`` reads it under a task.

        Behind a KV prefix that was computed from a text they are without the token that begins one.

        Args:
            prompt: the text.
            task: the task; ``None`` is the base model.
            images: its number of images.

        Raises:
            UnknownTaskError: the task is not deployed.
            RequestError: the text cannot be encoded, or the deployment has no tokenizer.
        """
        self._check_open()
        return self._inputs.encode_prompt(prompt, task, images)

    def check_prompt(
        self,
        prompt: list[int],
        images: Sequence[object] = (),
        task: str | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        """Check a prompt as ``generate`` does, without running it; raises what ``generate`` raises."""
        self._check_open()
        self._inputs.process_prompts(
            [prompt], [list(images)], task, chat=False, max_new_tokens=max_new_tokens, encode_images=False
        )

    def check_task(self, name: str) -> None:
        """Check a name as ``generate`` does, without loading the task.

        Raises ``UnknownTaskError``, or ``RequestError`` for dimensions that a task has not, as in ``topics@8``.
        """
        self._tasks.check(check_name(name, "name"))

    def load_task(self, name: str) -> None:
        """Load a task before its first use; raises ``UnknownTaskError``, or ``IntegrityError`` for altered files."""
        self._check_open()
        self._tasks.get(check_name(name, "name"))

    def unload_task(self, name: str) -> None:
        """Free the memory of a task; its next use loads it again. Raises ``UnknownTaskError``."""
        self._tasks.unload(check_name(name, "name"))

    def add_task(self, path: str | Path, name: str | None = None, *, replace: bool = False) -> str:
        """Add a task from an adapter folder, in this process only; the deployment folder is not changed.

        The adapter is read now. If it is unloaded, its next use reads the same folder again. A request takes the old
        adapter or the new one whole, and ends with the one it began with.

        Args:
            path: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
            name: the task's name; the folder's by default.
            replace: whether a task of that name may exist; it is then replaced.

        Returns:
            The task's name.

        Raises:
            AdapterError: the folder is not a complete adapter.
            ContractError: the adapter belongs to another base.
            RequestError: a task of that name exists, and ``replace`` is false.
        """
        self._check_open()
        check_flag(replace, "replace")
        named = None if name is None else check_name(name, "name")
        return self._tasks.add(check_path(path, "path"), named, replace=replace)

    def remove_task(self, name: str) -> None:
        """Remove a task, in this process only; raises ``UnknownTaskError``."""
        self._tasks.remove(check_name(name, "name"))

    def reload(self) -> Reload:
        """Take up what ``adalink export adapter`` and ``adalink remove`` have changed in the folder, without a pause.

        Requests under way end with the weights they began with. Tasks of ``add_task`` stay, also before one of that
        name in the folder. Files are verified at their first use, as after ``open``; tasks that were in memory are
        loaded now. After an error nothing has changed.

        Raises:
            ContractError: the base in the folder is another one: open the deployment again.
            DeploymentError: the folder is no deployment any more, or (``ManifestError``, ``IntegrityError``) damaged.
        """
        self._check_open()
        return self._reloader.reload()

    def receipt(self) -> Receipt:
        """Receipt: engines built so far, and files of the base and of loaded tasks read again; see ``Receipt``."""
        return self._runner.receipt(*self._tasks.loaded())

    def _check_open(self) -> None:
        if self._is_closed:
            raise RequestError("the deployment is closed: open it again")
