"""Manifest of a deployment: base, variants, tasks, and digests of all files (docs/concepts/file-formats.md)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from adalink.runtime.storage.adapter_spec import AdapterSpec
from adalink.runtime.storage.generation_schema import GenerationDefaults
from adalink.runtime.storage.pooling_schema import Pooling
from adalink.runtime.storage.table_schema import TableStorage
from adalink.runtime.storage.vision_schema import Grid, PatchTower, PromptForm, TileTokens, tiles_of

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 4
# Fields that came later have defaults: manifests of these versions mean what they meant.
READABLE_VERSIONS = (3, 4)
DTYPES = ("float32", "float16", "bfloat16")
# Dtypes of a KV cache that is not in the base's.
KV_CACHE_DTYPES = ("int8",)
FOLDS = ("table", "rank")
BASE_KINDS = ("decoder", "encoder", "encoder-decoder")
# A vision tower's working memory grows with the pixels of a call, and larger calls are hardly faster.
_PIXELS_AT_ONCE = 512 * 512


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the manifest: immutable, and an unknown field is an error."""


class FileRecord(_Strict, frozen=True, kw_only=True, gc=False):
    """Digest and size of one file."""

    sha256: str
    size_bytes: int


class Cache(_Strict, frozen=True, kw_only=True):
    """Shape of the KV cache: per layer, key and value of shape ``(batch, kv_heads, past, head_dim)``."""

    layers: int
    kv_heads: int
    head_dim: int

    def names(self) -> Iterator[tuple[str, str]]:
        """Names of each tensor as an input and as an output of a base graph, in their order."""
        for layer in range(self.layers):
            for tensor in ("key", "value"):
                yield f"past_key_values.{layer}.{tensor}", f"present.{layer}.{tensor}"


class Vision(_Strict, frozen=True, kw_only=True):
    """Vision section of a base: vision tower and projector before the engine.

    Attributes:
        architecture: Hugging Face ``model_type`` of the whole model.
        graph: path of the graph from ``pixel_values`` to ``image_embeds``, float32 whatever the base's dtype.
        files: the graph and its external data.
        preprocessor: path of the preprocessing steps (`adalink.runtime.vision.preprocess`).
        image_size: height and width of an image, or of a tile, in ``pixel_values``; where images keep their shape, of
            the piece that becomes one position.
        image_token_id: the image placeholder token.
        tokens_per_image: positions of an image; where images are cut, of a tile or piece.
        tiles: tokens around the tiles of an image; ``None`` if there are none.
        prompt_form: format of prompts, with images and without; ``None`` if prompts are used unchanged.
        patches: patch layout of images that keep their shape; the language model's positions follow their grid
            (`adalink.runtime.vision.mrope`). ``None`` for a base whose images or tiles have one size.
    """

    architecture: str
    graph: str
    files: tuple[str, ...]
    preprocessor: str
    image_size: tuple[int, int]
    image_token_id: int
    tokens_per_image: int
    tiles: TileTokens | None = None
    prompt_form: PromptForm | None = None
    patches: PatchTower | None = None

    @property
    def all_files(self) -> tuple[str, ...]:
        """Paths of all its files."""
        return (*self.files, self.preprocessor)

    @property
    def images_at_once(self) -> int:
        """Most images, or tiles of them, in a call of the vision tower, unless its plan sets another limit."""
        height, width = self.image_size
        return max(1, _PIXELS_AT_ONCE // (height * width))

    def positions(self, grid: Grid) -> int:
        """Number of image positions, each with a placeholder."""
        count = tiles_of(grid) if self.patches is None else grid[0] * grid[1]
        return count * self.tokens_per_image

    def image_tokens(self, grid: Grid) -> list[int]:
        """Tokens that replace the single placeholder of an image in a prompt."""
        if self.tiles is None:
            return [self.image_token_id] * self.positions(grid)
        return self.tiles.around([self.image_token_id] * self.tokens_per_image, grid)


class Base(_Strict, frozen=True, kw_only=True):
    """Base contract: what a task must match, and what the runtime needs to know about the model.

    Attributes:
        name: display name of the model.
        architecture: Hugging Face ``model_type``; for a vision model, its language model's.
        kind: one of ``BASE_KINDS``.
        fingerprint: digest of the input embedding matrix.
        weights_digest: digest of all weights (`adalink.training.models.loading.weights_digest`), vision tower included;
            empty in deployments of older kits.
        vocab_size: rows of the embedding table.
        hidden_size: width of the embeddings.
        embedding_dtype: dtype of embeddings, and so of ``inputs_embeds``; one of ``DTYPES``.
        modalities: modalities that the base takes.
        max_positions: longest sequence of the model; ``None`` without a limit.
        cache: shape of the KV cache; ``None`` for an encoder.
        eos_token_ids: tokens that end a generation.
        pad_token_id: token that fills shorter rows.
        bos_token_id: token that begins a text, for chat templates that write it.
        decoder_start_token_id: first decoder token of an encoder-decoder.
        embeddings: path of the table (safetensors, one tensor ``embeddings`` with shape ``(vocab, d)``): the output of
            the embedding module for each id, or what ``table`` says.
        table: how rows of the table are stored; ``None`` for embeddings themselves, as in deployments of older kits.
        tokenizer: path of ``tokenizer.json``; ``None`` when the checkpoint has none.
        chat_template: path of the Jinja chat template, if the model has one.
        special_tokens: the tokenizer's special tokens by name, such as ``eos_token``, for chat templates. ``None`` in
            deployments of older kits: templates then get the texts of ``bos_token_id`` and the first end token.
        bank: path of the shared adapter graph of each of ``adalink.runtime.storage.adapter.ACTIVATION_KEYS``.
        vision: the vision section; ``None`` for a text-only base.
        bidirectional_prompt: whether prompts attend in both directions, and only generated tokens are causal.
        tokenizer_digest: digest of the tokenizer (`adalink.runtime.storage.tokenizer_digest`); empty without one, and
            in deployments of older kits, whose tokenizer file is read instead.
        generation: how tokens are chosen by default; ``None`` in deployments of older kits, which take the likeliest.
        token_types: segments of a row that the base tells apart, such as the two texts of a pair; more than 1 if its
            graphs take ``token_type_ids``. ``None`` in deployments of older kits, whose graphs do not.
        tokenizer_types: whether the checkpoint's tokenizer gives the token types of a text; if not, all are 0.
        unused_tensors: tensors and files of the checkpoint that are left out on purpose, such as a classifier, with
            ``*`` for the number of a layer; empty also in deployments of older kits, which did not look.
        pooling: how an encoder's states become a vector by default; ``None`` where the checkpoint does not say, and in
            deployments of older kits.
    """

    name: str
    architecture: str
    kind: str
    fingerprint: str
    vocab_size: int
    hidden_size: int
    embedding_dtype: str
    modalities: tuple[str, ...]
    max_positions: int | None
    cache: Cache | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    embeddings: str
    tokenizer: str | None
    chat_template: str | None = None
    bank: dict[str, str]
    vision: Vision | None = None
    bidirectional_prompt: bool = False
    weights_digest: str = ""
    tokenizer_digest: str = ""
    generation: GenerationDefaults | None = None
    token_types: int | None = None
    tokenizer_types: bool = False
    special_tokens: dict[str, str | tuple[str, ...]] | None = None
    unused_tensors: tuple[str, ...] = ()
    pooling: Pooling | None = None
    table: TableStorage | None = None

    @property
    def takes_token_types(self) -> bool:
        """Whether graphs have the input ``token_type_ids``."""
        return self.token_types is not None and self.token_types > 1

    @property
    def has_hidden_states(self) -> bool:
        """Whether graphs give hidden states; a decoder's give logits."""
        return self.kind != "decoder"

    @property
    def takes_soft_prompts(self) -> bool:
        """Whether soft prompts can be prepended; not where positions follow the image grid."""
        return self.vision is None or self.vision.patches is None

    @property
    def no_kv_prefix(self) -> str:
        """Why no KV prefix can stand before rows of this base; empty if one can."""
        if self.kind == "encoder":
            return "an encoder has no KV cache"
        if self.kind == "encoder-decoder":
            return "its prompts are read by an encoder, which has no KV cache"
        if self.bidirectional_prompt:
            return "its prompts attend in both directions, and what stands before them would have to attend to them"
        if self.vision is not None and self.vision.patches is not None:
            return "its positions follow the grid of an image, in which a KV prefix has no place"
        return ""


class GgufTensors(_Strict, frozen=True, kw_only=True):
    """Tensors of one type of the GGUF file that a variant was made of, and what became of them.

    Attributes:
        type: their type in the file, such as ``"Q4_0"``.
        tensors: how many.
        bits: bits of a weight in the variant; 32 for float32.
        block_size: weights of a block; 0 without blocks.
        is_exact: whether the weights have exactly the file's values; otherwise they were quantised again.
    """

    type: str
    tensors: int
    bits: int
    block_size: int
    is_exact: bool


class Quantization(_Strict, frozen=True, kw_only=True):
    """Quantisation of a variant's constant matrices: blocks of integers, each with scale and zero point.

    Attributes:
        algorithm: quantisation algorithm.
        bits: bits of a weight.
        block_size: weights of a block, consecutive along the input.
        sensitive_bits: bits of a weight in the matrices most sensitive to rounding (docs/decisions/0007).
        sensitive_block_size: weights of a block in those matrices.
        activation_bits: bits of the matrices' inputs at run time.
        gguf: what became of the tensors of a GGUF file whose codes were kept; ``bits`` and ``sensitive_bits`` are then
            the fewest and the most. Empty for matrices that were quantised from floating point.
    """

    algorithm: str
    bits: int
    block_size: int
    sensitive_bits: int
    sensitive_block_size: int
    activation_bits: int
    gguf: tuple[GgufTensors, ...] = ()


class Variant(_Strict, frozen=True, kw_only=True):
    """Base variant: an ONNX graph, a compiled engine, or a GGUF file.

    Attributes:
        target: export target (``portable``, ``onnxruntime-cpu``, ``onnxruntime-cuda``, ``llama.cpp``); for a compiled
            engine, its backend.
        quantization: its quantisation; ``None`` if it is not quantised.
        backends: runtime backends that can run it.
        graph: path of the graph, of the engine's plan, or of the GGUF file; for an encoder-decoder, of its encoder.
        decoder_graph: path of the decoder of an encoder-decoder.
        vision_graph: path of a compiled engine's plan of the vision tower; without it the base's own graph runs.
        kv_cache_graphs: by dtype of the KV cache, path of a decoder's graph that keeps it so, over the same weights;
            ``graph`` keeps it in the base's dtype. Empty if there is no other, and in deployments of older kits.
        files: every file of the variant, the graphs and their external data, or the plans and their record.
        weights_digest: digest of its weights as they are, where they are not the base's: those of a GGUF file with the
            base's embeddings. Empty if they are the base's, or made of them.
    """

    target: str
    quantization: Quantization | None = None
    backends: tuple[str, ...]
    graph: str
    decoder_graph: str | None = None
    vision_graph: str | None = None
    kv_cache_graphs: dict[str, str] = {}
    files: tuple[str, ...]
    weights_digest: str = ""

    @property
    def is_compiled(self) -> bool:
        """Whether ``graph`` is the plan of an engine."""
        return not (self.graph.endswith(".onnx") or self.is_gguf)

    @property
    def is_gguf(self) -> bool:
        """Whether ``graph`` is a GGUF file."""
        return self.graph.endswith(".gguf")


class Fold(_Strict, frozen=True, kw_only=True):
    """Folded text task, precomputed for every token of the vocabulary (docs/concepts/file-formats.md).

    Attributes:
        kind: ``"table"``: the adapted embeddings; ``"rank"``: ``act(down(x))`` of each token.
        path: safetensors file with the one tensor.
    """

    kind: str
    path: str


class Task(AdapterSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Deployed task: settings and files of its adapter.

    Attributes:
        graph: path of the task graph.
        config: path of its ``adapter_config.json``.
        weights: path of its ``adapter_model.safetensors``.
        adapter_digest: digest of the adapter (`adalink.runtime.storage.adapter.Adapter.digest`).
        fold: the folded task, if it was exported with one.
        head_graph: path of the graph of its head, for other hosts; ``None`` without a head.
    """

    graph: str
    config: str
    weights: str
    adapter_digest: str
    fold: Fold | None = None
    head_graph: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the task's files."""
        paths: tuple[str, ...] = (self.graph, self.config, self.weights)
        paths = paths if self.head_graph is None else (*paths, self.head_graph)
        return paths if self.fold is None else (*paths, self.fold.path)


class Manifest(_Strict, frozen=True, kw_only=True):
    """The whole manifest; paths are relative to the deployment, with forward slashes.

    ``digest`` is the digest of the manifest, encoded with that field empty: every changed byte is detected. Only
    ``encode_manifest`` sets it.
    """

    schema_version: int
    kit_version: str
    base: Base
    variants: dict[str, Variant]
    tasks: dict[str, Task]
    files: dict[str, FileRecord]
    digest: str = ""

    def paths_in_use(self) -> set[str]:
        """Paths that the base, a variant or a task uses."""
        single = (self.base.embeddings, self.base.tokenizer, self.base.chat_template)
        vision = self.base.vision.all_files if self.base.vision else ()
        base = {path for path in (*single, *self.base.bank.values(), *vision) if path}
        variants = {path for variant in self.variants.values() for path in variant.files}
        tasks = {path for task in self.tasks.values() for path in task.files}
        return base | variants | tasks

    def size_bytes(self, paths: Iterable[str]) -> int:
        """Total size of the files at ``paths``."""
        return sum(self.files[path].size_bytes for path in paths)
