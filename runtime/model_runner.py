"""Model runner: the engines of a base variant, opened once and counted, and the prefix cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adalink.runtime.arrays import Array
from adalink.runtime.batch_inputs import BatchInputs
from adalink.runtime.engine import (
    Backend,
    DecodeState,
    Engine,
    EngineInput,
    InputEmbedder,
    KvPrefixEngine,
    SlotEngine,
)
from adalink.runtime.errors import BackendError, ContractError, RequestError
from adalink.runtime.finite import check_outputs
from adalink.runtime.generation.prefix_cache import PrefixCache, PrefixKey
from adalink.runtime.generation.prompt import PromptBatch
from adalink.runtime.options import OpenOptions
from adalink.runtime.receipt import Receipt, make_receipt
from adalink.runtime.request import check_input_ids, check_length
from adalink.runtime.storage.embedding_table import open_table
from adalink.runtime.storage.integrity import locate
from adalink.runtime.storage.manifest import Manifest, Variant
from adalink.runtime.storage.variants import choose_graph, variant_digest
from adalink.runtime.storage.vision_base import vision_base
from adalink.runtime.tasks.adapter_mapping import NO_ADAPTER
from adalink.runtime.tasks.kv_prefix import KvPrefix
from adalink.runtime.tasks.soft_prompt import SoftPromptLayout
from adalink.runtime.vision.mrope import grid_positions
from adalink.runtime.vision.placeholders import merge, prompt_cache_keys


class ModelRunner:
    """One base variant, ready to run; safe for several threads.

    Attributes:
        engine: the base's engine; of an encoder-decoder, the encoder's.
        slot_engine: the same engine if rows may join its batch at any step, else ``None``.
        prefixes: the prefix cache, if it is on.
    """

    def __init__(
        self, path: Path, manifest: Manifest, variant: Variant, backend: Backend, options: OpenOptions
    ) -> None:
        """Open the engines; arguments and errors are those of ``Deployment``."""
        self._path, self._manifest, self._variant = path, manifest, variant
        self._base = manifest.base
        self._variant_digest = variant_digest(manifest, variant)
        self._builds = 0
        self._table = open_table(locate(path, self._base.embeddings), self._base)
        self.engine = self._build(backend, choose_graph(manifest, variant, options.kv_cache_dtype), "base")
        self._decoder = self._build(backend, variant.decoder_graph, "decoder") if variant.decoder_graph else None
        self.slot_engine: SlotEngine | None = None
        # A prompt that attends in both directions is read at once.
        if self._decoder is None and isinstance(self.engine, SlotEngine) and not self._base.bidirectional_prompt:
            self.slot_engine = self.engine
        # Keys and values of another dtype than the base's would have to be rounded first.
        has_own_dtype = options.kv_cache_dtype in (None, self._base.embedding_dtype)
        self._kv_prefix_engine: KvPrefixEngine | None = None
        if not self._base.no_kv_prefix and has_own_dtype and isinstance(self.engine, KvPrefixEngine):
            self._kv_prefix_engine = self.engine
        prefix_cache_bytes = options.prefix_cache_bytes
        self.prefixes = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None
        if self.prefixes is not None and self.slot_engine is None:
            self.close()
            if self._base.bidirectional_prompt:
                raise RequestError(
                    f"prefix_cache_bytes is {prefix_cache_bytes}, but a prompt of {self._base.name} attends in both "
                    "directions: what its beginning leaves depends on its end; leave prefix_cache_bytes at 0"
                )
            raise RequestError(
                f"prefix_cache_bytes is {prefix_cache_bytes}, but {variant.graph} cannot go on from a kept "
                "prefix; only decoders exported with --target onnxruntime-cpu can: leave prefix_cache_bytes at 0"
            )

    def run(
        self, inputs: BatchInputs, layout: SoftPromptLayout, decoder_input_ids: npt.ArrayLike | None
    ) -> dict[str, Array]:
        """Forward pass over whole sequences with their soft prompts; see ``Deployment.run``."""
        if decoder_input_ids is not None and self._decoder is None:
            raise RequestError(f"decoder_input_ids is for encoder-decoders; {self._base.name} is none: leave it out")
        kv_prefixes = inputs.tasks.kv_prefixes(len(layout.mask))
        feeds = self.feeds(inputs, layout)
        output = (
            self._after(kv_prefixes).run_after(_states(kv_prefixes), feeds) if kv_prefixes else self.engine.run(feeds)
        )
        if self._base.kind == "decoder":
            return {"logits": layout.strip(output)}
        result = {"last_hidden_state": layout.strip(output)}
        if decoder_input_ids is not None and self._decoder is not None:
            result["logits"] = self._run_decoder(self._decoder, decoder_input_ids, output, layout.mask)
        return result

    def input_embeddings(self, inputs: BatchInputs) -> EngineInput:
        """Adapted embeddings as the engine takes them, without soft prompts."""
        embedder = self.engine.embedder
        if inputs.ids is not None and inputs.images is None:
            return embedder.lookup(inputs.ids, inputs.tasks, inputs.modality)
        embeds, modality = self._base_embeddings(inputs)
        return embedder.apply(embeds, inputs.tasks, modality)

    @property
    def embedder(self) -> InputEmbedder:
        """The input embedder of generated tokens."""
        return self.engine.embedder if self._decoder is None else self._decoder.embedder

    def start(self, batch: PromptBatch, max_new_tokens: int) -> DecodeState:
        """Prefill: run the prompts and keep their KV cache.

        Args:
            batch: the prompts, padded on the engine's side.
            max_new_tokens: most decode steps that may follow.

        Raises:
            RequestError: the engine takes no batch of this shape.
            BackendError: the engine refused, or an encoder's states are not numbers.
        """
        feeds, layout = self.feeds(batch.inputs, batch.layout), batch.layout
        if self._decoder is None:
            kv_prefixes = batch.inputs.tasks.kv_prefixes(len(layout.mask))
            if kv_prefixes:
                return self._after(kv_prefixes).start_after(_states(kv_prefixes), feeds, max_new_tokens)
            return self.engine.start(feeds, max_new_tokens)
        first = np.full((len(layout.mask), 1), self._base.decoder_start_token_id, np.int64)
        states = {"last_hidden_state": self.engine.run(feeds)}
        check_outputs(states, layout.mask, (), is_decoder=False)
        decoder_feeds = _decoder_feeds(self._decoder, first, states["last_hidden_state"], layout.mask)
        return self._decoder.start(decoder_feeds, max_new_tokens)

    def prefix_key(self, batch: PromptBatch) -> tuple[PrefixKey, Array]:
        """Prefix cache key of a batch of one prompt, and of each of its positions: soft prompt, tokens, images."""
        inputs, layout = batch.inputs, batch.layout
        assert inputs.ids is not None
        adapter = ("", "")
        if inputs.images is not None:
            adapter = inputs.tasks.adapters(1, self._base.modalities.index("image"))[0]
        images = () if inputs.images is None else inputs.images[0]
        text = prompt_cache_keys(inputs.ids[0], images, adapter[0], self._base.vision)
        before = "" if inputs.tasks.kv_prefix is None else inputs.tasks.kv_prefix.digest
        key = PrefixKey(self._base.fingerprint, *inputs.tasks.adapters(1)[0], before)
        return key, np.concatenate([layout.cache_keys(0), text])

    def check_kv_prefix(self, kv_prefix: KvPrefix) -> None:
        """Check that the engine can begin rows with a KV prefix.

        Raises:
            BackendError: this engine, or a KV cache of this dtype, takes none.
            ContractError: it was computed by another variant, or the base takes none.
        """
        self._after([kv_prefix])

    def read_states(self, batch: PromptBatch) -> Array:
        """Keys and values of a batch of one prompt; see ``KvPrefixEngine.read_states``."""
        return self._after([]).read_states(self.feeds(batch.inputs, batch.layout))

    def _after(self, kv_prefixes: Sequence[KvPrefix | None]) -> KvPrefixEngine:
        """The engine of rows with these KV prefixes; raises as ``check_kv_prefix``."""
        digests = {prefix.spec.variant_digest for prefix in kv_prefixes if prefix is not None} - {""}
        if others := digests - {self._variant_digest}:
            variants = self._manifest.variants.items()
            names = [name for name, variant in variants if variant_digest(self._manifest, variant) in others]
            raise ContractError(
                f"the task's KV prefix was computed by the base variant {' or '.join(names) or min(others)}, the open "
                f"one is {self._variant.graph} ({self._variant_digest}), which computes other numbers: open the "
                "deployment with that variant, or compute the prefix again with 'adalink export prefix' and --variant"
            )
        if self._base.no_kv_prefix:
            raise ContractError(f"{self._base.name} takes no KV prefix: {self._base.no_kv_prefix}")
        if self._kv_prefix_engine is None:
            raise BackendError(
                f"a KV prefix was asked for, and {self._variant.graph} on this backend begins every row with an empty "
                "KV cache: open the deployment with the backend onnxruntime-cpu, and without kv_cache_dtype"
            )
        return self._kv_prefix_engine

    def receipt(self, manifest: Manifest, tasks: Mapping[str, Sequence[str]]) -> Receipt:
        """See ``Deployment.receipt``.

        Args:
            manifest: the manifest of the tasks; its base is the one that runs.
            tasks: the files of each loaded task of it.
        """
        expected = 1 if self._decoder is None else 2
        vision = self._base.vision
        paths = (*self._variant.files, manifest.base.embeddings, *(vision.all_files if vision else ()))
        return make_receipt(self._path, manifest, paths, self._builds, expected, tasks)

    def close(self) -> None:
        """Free the engines' memory."""
        self.engine.close()
        if self._decoder is not None:
            self._decoder.close()

    def _build(self, backend: Backend, graph: str, role: str) -> Engine:
        """Open a base graph and count it; engines are opened nowhere else."""
        self._builds += 1
        return backend.open_engine(locate(self._path, graph), self._base, role, self._table)

    def feeds(self, inputs: BatchInputs, layout: SoftPromptLayout) -> dict[str, EngineInput]:
        """Engine inputs for whole rows; a soft prompt is of token type 0, as in training."""
        types = {} if inputs.types is None else {"token_type_ids": layout.place(inputs.types)}
        if layout.is_empty:
            embeds = self.input_embeddings(inputs)
            return {"inputs_embeds": embeds, "attention_mask": layout.mask, **self._positions(inputs, layout), **types}
        embeds, modality = self._base_embeddings(inputs)
        wide, indices = layout.prepend(embeds, modality)
        adapted = self.engine.embedder.apply(wide, inputs.tasks, indices)
        return {"inputs_embeds": adapted, "attention_mask": layout.mask, **types}

    def _positions(self, inputs: BatchInputs, layout: SoftPromptLayout) -> dict[str, Array]:
        """Position ids of a base whose positions follow the image grid; other engines compute their own."""
        vision = self._base.vision
        if vision is None or vision.patches is None:
            return {}
        grids = [[image.grid for image in row_images] for row_images in inputs.images or ()]
        return {"position_ids": grid_positions(inputs.ids, layout.mask, grids, vision.image_token_id)}

    def _base_embeddings(self, inputs: BatchInputs) -> tuple[Array, Array | None]:
        """Embeddings before the bottleneck, images merged, and the modality of each position."""
        if inputs.ids is None:
            assert inputs.embeds is not None
            return inputs.embeds, inputs.modality
        embeds, modality = inputs.tasks.embed(self._table, inputs.ids, inputs.modality), inputs.modality
        if inputs.images is not None:
            embeds, modality = merge(embeds, inputs.ids, inputs.images, vision_base(self._base))
        return embeds, modality

    def _run_decoder(self, decoder: Engine, decoder_input_ids: npt.ArrayLike, states: Array, mask: Array) -> Array:
        ids = check_input_ids(decoder_input_ids, self._base, "decoder_input_ids")
        if len(ids) != len(states):
            raise RequestError(f"decoder_input_ids has {len(ids)} rows, the encoder's input {len(states)}")
        check_length(ids.shape[1], self._base)
        return decoder.run(_decoder_feeds(decoder, ids, states, mask))


def _states(kv_prefixes: Sequence[KvPrefix | None]) -> list[Array | None]:
    return [None if prefix is None else prefix.states for prefix in kv_prefixes]


def _decoder_feeds(decoder: Engine, ids: Array, states: Array, mask: Array) -> dict[str, EngineInput]:
    return {
        "inputs_embeds": decoder.embedder.lookup(ids, NO_ADAPTER),
        "attention_mask": np.ones(ids.shape, np.int64),
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask,
    }
