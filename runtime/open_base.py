"""The base of an open deployment: its engines, opened once and counted, and what prompts left in their cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adalink.runtime.bank import PLAIN, Selection
from adalink.runtime.embeddings import open_table
from adalink.runtime.engine import Array, Backend, Decoding, Engine, Fed, Front, ResumableEngine
from adalink.runtime.errors import RequestError
from adalink.runtime.integrity import locate
from adalink.runtime.manifest import Manifest, Variant
from adalink.runtime.placeholders import ImageEmbeds, merge, prefix_names
from adalink.runtime.prefix_cache import PrefixCache, PrefixKey
from adalink.runtime.receipt import Receipt, make_receipt
from adalink.runtime.request import check_input_ids, check_length


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
            raise RequestError(
                f"prefix_cache_bytes is {prefix_cache_bytes}, but {variant.graph} cannot go on from a kept "
                "prefix; only decoders exported with --target onnxruntime-cpu can: leave prefix_cache_bytes at 0"
            )

    def run(self, embeds: Fed, mask: Array, decoder_input_ids: npt.ArrayLike | None) -> dict[str, Array]:
        """Run whole sequences; see ``Deployment.run``."""
        output = self.engine.run({"inputs_embeds": embeds, "attention_mask": mask})
        if self._base.kind == "decoder":
            return {"logits": output}
        result = {"last_hidden_state": output}
        if decoder_input_ids is not None:
            result["logits"] = self._run_decoder(decoder_input_ids, output, mask)
        return result

    def lookup(
        self,
        ids: Array,
        tasks: Selection,
        modality: Array | None = None,
        images: Sequence[Sequence[ImageEmbeds]] | None = None,
    ) -> Fed:
        """What the engine is fed for token ids of shape ``(batch, seq)``, each row through its task.

        Args:
            ids: token ids; placeholders for all that the images take up.
            tasks: the task of each row.
            modality: of each position; ``None`` for text, or for what follows from the images.
            images: those of each row; ``None`` if there are none in the batch.
        """
        if images is None:
            return self.engine.front.lookup(ids, tasks, modality)
        embeds, modality = merge(self._table, ids, images, self._base)
        return self.engine.front.apply(embeds, tasks, modality)

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        ids: Array,
        mask: Array,
        tasks: Selection,
        room: int,
        images: Sequence[Sequence[ImageEmbeds]] | None = None,
    ) -> tuple[Decoding, Front, Selection]:
        """Run prompts, to go on after them.

        Args:
            prompts: token ids of each.
            ids: the same, padded to ``(batch, seq)``.
            mask: 1 for tokens, ``(batch, seq)``.
            tasks: the task of each row.
            room: how many steps may follow.
            images: as for ``lookup``.

        Returns:
            The batch on its way, and the front and the tasks that generated tokens go through.
        """
        front = self.engine.front
        feeds = {"inputs_embeds": self.lookup(ids, tasks, images=images), "attention_mask": mask}
        if self._decoder is not None:
            first = np.full((len(prompts), 1), self._base.decoder_start_token_id, np.int64)
            fed = _decoder_feeds(self._decoder, first, self.engine.run(feeds), mask)
            return self._decoder.start(fed, room), self._decoder.front, PLAIN
        adapting = front.decoding(tasks)
        if self._prefixes is None:
            return self.engine.start(feeds, room), front, adapting
        names = self._names(prompts, tasks, images)
        return self._resume(*self._prefixes, feeds, names, tasks, room), front, adapting

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

    def _names(
        self, prompts: Sequence[Sequence[int]], tasks: Selection, images: Sequence[Sequence[ImageEmbeds]] | None
    ) -> list[Array]:
        """The prompts by what was computed for them: tokens, and images with the adapter they went through."""
        if images is None:
            return [np.array(tokens, np.int64) for tokens in prompts]
        through = tasks.adapters(len(prompts), self._base.modalities.index("image"))
        return [
            prefix_names(tokens, own, adapter, self._base.vision)
            for tokens, own, (adapter, _) in zip(prompts, images, through, strict=True)
        ]

    def _resume(
        self,
        prefixes: PrefixCache,
        engine: ResumableEngine,
        feeds: dict[str, Fed],
        rows: list[Array],
        tasks: Selection,
        room: int,
    ) -> Decoding:
        """Run prompts, those whose beginning was run before from there on."""
        keys = [PrefixKey(self._base.fingerprint, *adapter) for adapter in tasks.adapters(len(rows))]
        known = [prefixes.find(key, tokens) for key, tokens in zip(keys, rows, strict=True)]
        decoding = engine.resume(feeds, room, known)
        for row, (key, tokens, states) in enumerate(zip(keys, rows, known, strict=True)):
            if states is None or states.shape[2] < len(tokens) - 1:
                prefixes.add(key, tokens, decoding.states(row, len(tokens)))
        return decoding

    def _run_decoder(self, decoder_input_ids: npt.ArrayLike, states: Array, mask: Array) -> Array:
        if self._decoder is None:
            raise RequestError(f"decoder_input_ids is for encoder-decoders; {self._base.name} has no decoder")
        ids = check_input_ids(decoder_input_ids, self._base, "decoder_input_ids")
        if len(ids) != len(states):
            raise RequestError(f"decoder_input_ids has {len(ids)} rows, the encoder's input {len(states)}")
        check_length(ids.shape[1], self._base)
        return self._decoder.run(_decoder_feeds(self._decoder, ids, states, mask))


def _decoder_feeds(decoder: Engine, ids: Array, states: Array, mask: Array) -> dict[str, Fed]:
    return {
        "inputs_embeds": decoder.front.lookup(ids, PLAIN),
        "attention_mask": np.ones(ids.shape, np.int64),
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask,
    }
