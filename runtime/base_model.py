"""The base of an open deployment: its engines, opened once and counted, and what prompts left in their cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adalink.runtime.arrays import Array
from adalink.runtime.engine import Backend, DecodeState, Engine, EngineInput, InputEmbedder, ResumableEngine
from adalink.runtime.errors import RequestError
from adalink.runtime.generation.prefix_cache import PrefixCache, PrefixKey
from adalink.runtime.receipt import Receipt, make_receipt
from adalink.runtime.request import check_input_ids, check_length
from adalink.runtime.storage.embedding_table import open_table
from adalink.runtime.storage.integrity import locate
from adalink.runtime.storage.manifest import Manifest, Variant
from adalink.runtime.tasks.adapter_mapping import NO_ADAPTER, AdapterMapping
from adalink.runtime.tasks.soft_prompt import SoftPromptLayout
from adalink.runtime.vision.mrope import grid_positions
from adalink.runtime.vision.placeholders import ImageEmbeds, merge, prompt_cache_keys


@dataclass(frozen=True, eq=False)
class Given:
    """A checked batch before its tasks.

    Attributes:
        ids: token ids, int64 with shape ``(batch, seq)``, placeholders for all that images take up; or else
        embeds: embeddings with shape ``(batch, seq, d)``.
        modality: of each position, ``(batch, seq)``; ``None`` for text, or for what follows from the images.
        tasks: the task of each row.
        images: those of each row; ``None`` if there are none in the batch.
    """

    ids: Array | None
    embeds: Array | None
    modality: Array | None
    tasks: AdapterMapping
    images: Sequence[Sequence[ImageEmbeds]] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(batch, seq)``."""
        source = self.embeds if self.ids is None else self.ids
        assert source is not None
        return source.shape[0], source.shape[1]


class OpenBase:
    """One form of a base, ready to run; safe for calls from several threads.

    Attributes:
        engine: the base; the encoder of an encoder-decoder.
    """

    def __init__(
        self, path: Path, manifest: Manifest, variant: Variant, backend: Backend, prefix_cache_bytes: int = 0
    ) -> None:
        """Open the engines; the arguments are those of ``Deployment``, which raises what this does."""
        self._path, self._manifest, self._variant = path, manifest, variant
        self._base = manifest.base
        self._builds = 0
        self._table = open_table(locate(path, self._base.embeddings), self._base)
        self.engine = self._build(backend, variant.graph, "base")
        self._decoder = self._build(backend, variant.decoder_graph, "decoder") if variant.decoder_graph else None
        self._prefixes: tuple[PrefixCache, ResumableEngine] | None = None
        if prefix_cache_bytes and self._decoder is None and isinstance(self.engine, ResumableEngine):
            self._prefixes = PrefixCache(prefix_cache_bytes), self.engine
        elif prefix_cache_bytes:
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

    def run(self, given: Given, layout: SoftPromptLayout, decoder_input_ids: npt.ArrayLike | None) -> dict[str, Array]:
        """Run whole sequences, laid out with their soft prompts; see ``Deployment.run``."""
        if decoder_input_ids is not None and self._decoder is None:
            raise RequestError(f"decoder_input_ids is for encoder-decoders; {self._base.name} is none: leave it out")
        output = self.engine.run(self._feeds(given, layout))
        if self._base.kind == "decoder":
            return {"logits": layout.strip(output)}
        result = {"last_hidden_state": layout.strip(output)}
        if decoder_input_ids is not None and self._decoder is not None:
            result["logits"] = self._run_decoder(self._decoder, decoder_input_ids, output, layout.mask)
        return result

    def adapt(self, given: Given) -> EngineInput:
        """What the engine is fed for the positions given, each row through its task, without soft prompts."""
        embedder = self.engine.embedder
        if given.ids is not None and given.images is None:
            return embedder.lookup(given.ids, given.tasks, given.modality)
        embeds, modality = self._unadapted(given)
        return embedder.apply(embeds, given.tasks, modality)

    def start(
        self, prompts: Sequence[Sequence[int]], given: Given, layout: SoftPromptLayout, max_new_tokens: int
    ) -> tuple[DecodeState, InputEmbedder, AdapterMapping]:
        """Run prompts, to go on after them.

        Args:
            prompts: token ids of each.
            given: the same, padded.
            layout: where they stand behind their soft prompts.
            max_new_tokens: how many steps may follow.

        Returns:
            The batch on its way, and the embedder and the tasks that generated tokens go through.
        """
        embedder, feeds = self.engine.embedder, self._feeds(given, layout)
        if self._decoder is not None:
            first = np.full((len(prompts), 1), self._base.decoder_start_token_id, np.int64)
            fed = _decoder_feeds(self._decoder, first, self.engine.run(feeds), layout.mask)
            return self._decoder.start(fed, max_new_tokens), self._decoder.embedder, NO_ADAPTER
        adapting = embedder.decoding(given.tasks)
        if self._prefixes is None:
            return self.engine.start(feeds, max_new_tokens), embedder, adapting
        names = self._names(prompts, given, layout)
        return self._resume(*self._prefixes, feeds, names, given.tasks, max_new_tokens), embedder, adapting

    def receipt(self) -> Receipt:
        """See ``Deployment.receipt``."""
        expected = 1 if self._decoder is None else 2
        vision = self._base.vision
        paths = (*self._variant.files, self._base.embeddings, *(vision.all_files if vision else ()))
        return make_receipt(self._path, self._manifest, paths, self._builds, expected)

    def close(self) -> None:
        """Give the engines' memory back."""
        self.engine.close()
        if self._decoder is not None:
            self._decoder.close()

    def _build(self, backend: Backend, graph: str, role: str) -> Engine:
        """Open a base graph, and count it: the only place where an engine is made."""
        self._builds += 1
        return backend.open_engine(locate(self._path, graph), self._base, role, self._table)

    def _feeds(self, given: Given, layout: SoftPromptLayout) -> dict[str, EngineInput]:
        """What the engine is fed for whole rows."""
        if layout.is_empty:
            return {"inputs_embeds": self.adapt(given), "attention_mask": layout.mask, **self._positions(given, layout)}
        embeds, modality = self._unadapted(given)
        wide, indices = layout.prepend(embeds, modality)
        return {"inputs_embeds": self.engine.embedder.apply(wide, given.tasks, indices), "attention_mask": layout.mask}

    def _positions(self, given: Given, layout: SoftPromptLayout) -> dict[str, Array]:
        """Position ids of a base whose positions follow the grid of pictures; other engines count them themselves."""
        vision = self._base.vision
        if vision is None or vision.patches is None:
            return {}
        grids = [[image.grid for image in own] for own in given.images or ()]
        return {"position_ids": grid_positions(given.ids, layout.mask, grids, vision.image_token_id)}

    def _unadapted(self, given: Given) -> tuple[Array, Array | None]:
        """Embeddings before any bottleneck, with images in place, and the modality of each position."""
        if given.ids is None:
            assert given.embeds is not None
            return given.embeds, given.modality
        embeds, modality = given.tasks.embed(self._table, given.ids, given.modality), given.modality
        if given.images is not None:
            embeds, modality = merge(embeds, given.ids, given.images, self._base)
        return embeds, modality

    def _names(self, prompts: Sequence[Sequence[int]], given: Given, layout: SoftPromptLayout) -> list[Array]:
        """The prompts by what was computed for them: soft prompts, tokens, images with what they went through."""
        images = given.images
        through = [("", "")] * len(prompts)
        if images is not None:
            through = given.tasks.adapters(len(prompts), self._base.modalities.index("image"))
        return [
            np.concatenate(
                [
                    layout.names(row),
                    prompt_cache_keys(
                        tokens, () if images is None else images[row], through[row][0], self._base.vision
                    ),
                ]
            )
            for row, tokens in enumerate(prompts)
        ]

    def _resume(
        self,
        prefixes: PrefixCache,
        engine: ResumableEngine,
        feeds: dict[str, EngineInput],
        rows: list[Array],
        tasks: AdapterMapping,
        max_new_tokens: int,
    ) -> DecodeState:
        """Run prompts, those whose beginning was run before from there on."""
        keys = [PrefixKey(self._base.fingerprint, *adapter) for adapter in tasks.adapters(len(rows))]
        known = [prefixes.find(key, tokens) for key, tokens in zip(keys, rows, strict=True)]
        decoding = engine.resume(feeds, max_new_tokens, known)
        for row, (key, tokens, states) in enumerate(zip(keys, rows, known, strict=True)):
            if states is None or states.shape[2] < len(tokens) - 1:
                prefixes.add(key, tokens, decoding.states(row, len(tokens)))
        return decoding

    def _run_decoder(self, decoder: Engine, decoder_input_ids: npt.ArrayLike, states: Array, mask: Array) -> Array:
        ids = check_input_ids(decoder_input_ids, self._base, "decoder_input_ids")
        if len(ids) != len(states):
            raise RequestError(f"decoder_input_ids has {len(ids)} rows, the encoder's input {len(states)}")
        check_length(ids.shape[1], self._base)
        return decoder.run(_decoder_feeds(decoder, ids, states, mask))


def _decoder_feeds(decoder: Engine, ids: Array, states: Array, mask: Array) -> dict[str, EngineInput]:
    return {
        "inputs_embeds": decoder.embedder.lookup(ids, NO_ADAPTER),
        "attention_mask": np.ones(ids.shape, np.int64),
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask,
    }
