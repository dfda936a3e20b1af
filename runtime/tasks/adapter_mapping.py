"""The bank: which rows of a batch go through which weights (docs/decisions/0006-bank.md).

All tasks of one kind share one graph that takes their weights as inputs. A batch under one task feeds it views of that
task's own weights, of any rank; a mixed batch feeds it the weights of its rows, stacked. Rows of the base model go
through no graph: they pass bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.engine import SharedAdapterGraph
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.tasks.folding import Folded
from adalink.runtime.tasks.soft_prompt import SoftPrompt


@dataclass(frozen=True, eq=False)
class AdapterGroup:
    """Rows of a batch whose positions of one modality go through one bank graph in one call.

    Attributes:
        rows: which rows of the batch, int64; ``None`` for all of them.
        modality: index in the base's modalities; 0 is text.
        scope: ``"all"``, or ``"prompt"`` for rows whose generated tokens are left alone.
        digest: of the adapter; of the first one where parts were stacked.
        graph: the arithmetic.
        weights: its inputs, one set for all rows or one for each of ``rows``.
    """

    rows: Array | None
    modality: int
    scope: str
    digest: str
    graph: SharedAdapterGraph
    weights: Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class TokenEmbeddingDelta:
    """Rows of a batch whose task adds to a token what it has for its id.

    Attributes:
        rows: which rows of the batch, int64; ``None`` for all of them.
        scope: as in ``AdapterGroup``.
        digest: of the adapter.
        table: gives the embeddings with what is added.
    """

    rows: Array | None
    scope: str
    digest: str
    table: Folded


class AdapterMapping:
    """The tasks of the rows of one batch: it ends with the weights it began with, whatever is added or removed."""

    __slots__ = ("_fold", "_parts", "_prompts", "_tables", "_text", "_whole", "_whole_weights")

    def __init__(
        self,
        parts: Sequence[AdapterGroup],
        fold: Folded | None = None,
        *,
        tables: Sequence[TokenEmbeddingDelta] = (),
        prompts: Sequence[tuple[Array | None, SoftPrompt]] = (),
    ) -> None:
        """Say what rows go through.

        Args:
            parts: bottlenecks.
            fold: all of it for text, computed ahead.
            tables: what is looked up by token id.
            prompts: soft prompts, with the rows that begin with them; ``None`` for all.
        """
        self._parts = tuple(parts)
        self._fold = fold
        self._tables = tuple(tables)
        self._prompts = tuple(prompts)
        self._text = text = tuple(part for part in parts if part.modality == 0)
        # One task for a whole batch of text, which is what nearly every call is.
        is_whole = len(text) == 1 and text[0].rows is None
        self._whole = text[0].graph if is_whole else None
        self._whole_weights = text[0].weights if is_whole else {}

    def lookup(self, table: Array, ids: Array, modality: Array | None = None) -> Array:
        """Adapted embeddings of token ids, by the task's folded form where the whole batch has a task that is folded.

        Args:
            table: the base's embedding table with shape ``(vocab, d)``.
            ids: token ids with shape ``(batch, seq)``.
            modality: as in ``apply``.
        """
        if self._fold is not None and modality is None:
            return self._fold.lookup(table, ids)
        embeds = self.embed(table, ids, modality) if self._tables else table.take(ids, axis=0)
        return self.apply(embeds, modality)

    def embed(self, table: Array, ids: Array, modality: Array | None = None) -> Array:
        """Embeddings before any bottleneck: those of the base, with what tasks have for token ids; as ``lookup``."""
        embeds = table.take(ids, axis=0)
        for own in self._tables:
            rows = slice(None) if own.rows is None else own.rows
            changed = own.table.lookup(table, ids[rows])
            if modality is not None:
                changed = np.where((modality[rows] == 0)[..., None], changed, embeds[rows])
            embeds[rows] = changed
        return embeds

    def apply(self, embeds: Array, modality: Array | None = None) -> Array:
        """Adapt each row by its task.

        Args:
            embeds: shape ``(batch, seq, d)``; not changed. Rows of the base model are returned bit for bit.
            modality: index in the base's modalities for each position, ``(batch, seq)``; ``None`` means text.
        """
        if modality is None and self._whole is not None:
            return self._whole.run(embeds, self._whole_weights)
        parts = self._text if modality is None else self._parts
        if not parts:
            return embeds
        result = embeds.copy()
        for part in parts:
            rows = slice(None) if part.rows is None else part.rows
            adapted = part.graph.run(embeds[rows], part.weights)
            if modality is not None:
                adapted = np.where((modality[rows] == part.modality)[..., None], adapted, result[rows])
            result[rows] = adapted
        return result

    def soft_prompts(self, batch: int) -> list[SoftPrompt | None]:
        """What each row begins with; empty if no row has a soft prompt."""
        if not self._prompts:
            return []
        found: list[SoftPrompt | None] = [None] * batch
        for rows, prompt in self._prompts:
            for row in range(batch) if rows is None else rows.tolist():
                found[row] = prompt
        return found

    @property
    def needs_ids(self) -> bool:
        """Whether a task looks token ids up, so that embeddings alone do not do."""
        return bool(self._tables)

    def adapters(self, batch: int, modality: int = 0) -> list[tuple[str, str]]:
        """Digest and scope of the adapter that one modality of each row goes through; empty for none."""
        found = [("", "")] * batch
        parts: list[AdapterGroup | TokenEmbeddingDelta] = [part for part in self._parts if part.modality == modality]
        for part in (*parts, *(self._tables if modality == 0 else ())):
            for row in range(batch) if part.rows is None else part.rows.tolist():
                found[row] = (part.digest, part.scope)
        return found

    @property
    def parts(self) -> tuple[AdapterGroup, ...]:
        """What rows go through, in no particular order."""
        return self._parts

    def generated(self) -> AdapterMapping:
        """What generated tokens go through at every step: text only, without tasks of scope ``"prompt"``."""
        return AdapterMapping([part for part in self._text if part.scope == "all"], tables=self._generated_tables())

    def decoding(self) -> AdapterMapping:
        """As ``generated``, with weights stacked: a step is one call of each graph however many tasks there are."""
        parts, tables = [part for part in self._text if part.scope == "all"], self._generated_tables()
        if len(parts) == len(self._parts) <= 1 and len(tables) == len(self._tables):
            return self
        together: dict[SharedAdapterGraph, list[AdapterGroup]] = {}
        for part in parts:
            together.setdefault(part.graph, []).append(part)
        stacked = [group[0] if len(group) == 1 else _stack(group) for group in together.values()]
        return AdapterMapping(stacked, tables=tables)

    def take(self, kept: Sequence[int]) -> AdapterMapping:
        """The selection of a batch made of some rows of this one, in the order given, past its soft prompts."""
        parts = [part for old in self._parts if (part := _take(old, np.asarray(kept))) is not None]
        tables = []
        for own in self._tables:
            rows = None if own.rows is None else np.flatnonzero(np.isin(kept, own.rows))
            if rows is None or len(rows):
                tables.append(replace(own, rows=rows))
        return AdapterMapping(parts, self._fold, tables=tables)

    def _generated_tables(self) -> list[TokenEmbeddingDelta]:
        return [own for own in self._tables if own.scope == "all"]


NO_ADAPTER = AdapterMapping(())


def mix(members: Iterable[tuple[AdapterMapping, Array]]) -> AdapterMapping:
    """The selection of a batch of several tasks.

    Args:
        members: for each task the selection of a batch that has no other, and the rows that have it, int64.
    """
    parts: list[AdapterGroup] = []
    tables: list[TokenEmbeddingDelta] = []
    prompts: list[tuple[Array | None, SoftPrompt]] = []
    for alone, rows in members:
        parts += [replace(part, rows=rows) for part in alone._parts]
        tables += [replace(own, rows=rows) for own in alone._tables]
        prompts += [(rows, prompt) for _, prompt in alone._prompts]
    return AdapterMapping(parts, tables=tables, prompts=prompts)


def task_groups(adapter: Adapter, modalities: Sequence[str], graph: SharedAdapterGraph) -> list[AdapterGroup]:
    """The parts of a batch whose rows all have this task; their weights are views of the adapter's.

    Args:
        adapter: the task's adapter.
        modalities: those of the base.
        graph: the bank graph of the adapter's kind.
    """
    config = adapter.config
    if not config.rank or config.input == "ids":
        return []
    return [
        AdapterGroup(None, index, config.scope, adapter.digest, graph, bank_weights(adapter, modality))
        for index, modality in enumerate(modalities)
        if modality in config.modalities
    ]


def bank_weights(adapter: Adapter, modality: str) -> dict[str, Array]:
    """An adapter's weights for one modality as a bank graph takes them, for all rows: views, nothing is copied."""
    weights = {name: adapter.weights[f"{modality}.{name}.weight"][None] for name in ("down", "up")}
    if adapter.config.bias:
        weights |= {f"{name}_bias": adapter.weights[f"{modality}.{name}.bias"][None, None] for name in ("down", "up")}
    return weights


def _take(part: AdapterGroup, kept: Array) -> AdapterGroup | None:
    """A part of the batch that is left when only some rows are kept; ``None`` if none of them is its own."""
    if part.rows is None:
        return part
    places = {row: place for place, row in enumerate(part.rows.tolist())}
    own = [(row, places[old]) for row, old in enumerate(kept.tolist()) if old in places]
    if not own:
        return None
    rows, sets = (np.array(numbers) for numbers in zip(*own, strict=True))
    is_shared = all(len(value) == 1 for value in part.weights.values())
    weights = part.weights if is_shared else {name: value[sets] for name, value in part.weights.items()}
    return replace(part, rows=rows, weights=weights)


def _stack(parts: Sequence[AdapterGroup]) -> AdapterGroup:
    """Parts of one graph as one, with one set of weights for each row.

    Smaller ranks are filled up with zeros. That is exact: every activation maps 0 to 0, and a sum is not changed by
    terms that are 0.
    """
    groups = [part.rows for part in parts if part.rows is not None]
    assert len(groups) == len(parts), "rows of several tasks are listed"
    rows = np.concatenate(groups)
    weights = {}
    for name in parts[0].weights:
        largest = np.max([part.weights[name].shape[1:] for part in parts], axis=0)
        weights[name] = np.zeros((len(rows), *largest), np.float32)
    start = 0
    for part, group in zip(parts, groups, strict=True):
        stop = start + len(group)
        for name, own in part.weights.items():
            weights[name][start:stop, : own.shape[1], : own.shape[2]] = own
        start = stop
    return replace(parts[0], rows=rows, weights=weights)
