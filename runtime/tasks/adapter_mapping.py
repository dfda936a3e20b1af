"""Adapter mapping: which rows of a batch use which adapter (docs/decisions/0006-bank.md).

All adapters of one activation and bias share one graph, which takes their weights as inputs. A batch of one task passes
views of that task's weights, of any rank. A mixed batch passes the stacked weights of its rows. Rows of the base model
skip the graph: they are unchanged bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.engine import SharedAdapterGraph
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.label_spec import LabelSet
from adalink.runtime.tasks.folding import Folded
from adalink.runtime.tasks.head import TaskHead
from adalink.runtime.tasks.kv_prefix import KvPrefix
from adalink.runtime.tasks.soft_prompt import SoftPrompt

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class AdapterGroup:
    """Rows of a batch, and the positions of one modality in them, that one call of a shared adapter graph adapts.

    Attributes:
        rows: which rows of the batch, int64; ``None`` for all of them.
        modality: index in the base's modalities; 0 is text.
        scope: ``"all"``, or ``"prompt"`` where generated tokens are not adapted.
        digest: the adapter's; of stacked groups, the first one's.
        graph: the shared adapter graph.
        weights: its weight inputs, one set for all rows or one for each of ``rows``.
    """

    rows: Array | None
    modality: int
    scope: str
    digest: str
    graph: SharedAdapterGraph
    weights: Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class TokenEmbeddingDelta:
    """Rows of a batch whose task adds a learned vector to each token embedding, looked up by token id.

    Attributes:
        rows: which rows of the batch, int64; ``None`` for all of them.
        scope: as in ``AdapterGroup``.
        digest: the adapter's.
        table: gives embeddings with the delta added.
    """

    rows: Array | None
    scope: str
    digest: str
    table: Folded


class AdapterMapping:
    """The adapters of one batch, fixed for its lifetime: adding or removing tasks does not affect it."""

    __slots__ = (
        *("_deltas", "_fold", "_groups", "_kv_prefixes", "_prompts", "_text", "_whole", "_whole_weights"),
        *("head", "labels"),
    )

    def __init__(
        self,
        groups: Sequence[AdapterGroup],
        fold: Folded | None = None,
        *,
        deltas: Sequence[TokenEmbeddingDelta] = (),
        prompts: Sequence[tuple[Array | None, SoftPrompt]] = (),
        kv_prefixes: Sequence[tuple[Array | None, KvPrefix]] = (),
        head: TaskHead | None = None,
        labels: LabelSet | None = None,
    ) -> None:
        """Define the mapping.

        Args:
            groups: adapter groups.
            fold: the task on text, precomputed for every token; only for a batch of one task.
            deltas: token embedding deltas.
            prompts: soft prompts with their rows; ``None`` for all rows.
            kv_prefixes: KV prefixes, likewise.
            head: the task's head; only for a batch of one task.
            labels: likewise, the labels that it says as text.
        """
        self.head, self.labels = head, labels
        self._groups = tuple(groups)
        self._fold = fold
        self._deltas = tuple(deltas)
        self._prompts = tuple(prompts)
        self._kv_prefixes = tuple(kv_prefixes)
        self._text = text = tuple(group for group in groups if group.modality == 0)
        # The common case: one task for a whole batch of text.
        is_whole = len(text) == 1 and text[0].rows is None
        self._whole = text[0].graph if is_whole else None
        self._whole_weights = text[0].weights if is_whole else {}

    def lookup(self, table: EmbeddingTable, ids: Array, modality: Array | None = None) -> Array:
        """Adapted embeddings of token ids; a batch of one folded task is a table lookup.

        Args:
            table: the base's embedding table.
            ids: token ids with shape ``(batch, seq)``.
            modality: as in ``apply``.
        """
        if self._fold is not None and modality is None:
            return self._fold.lookup(table, ids)
        embeds = self.embed(table, ids, modality) if self._deltas else table.take(ids)
        return self.apply(embeds, modality)

    def embed(self, table: EmbeddingTable, ids: Array, modality: Array | None = None) -> Array:
        """Embeddings before the bottleneck: the base's, plus token embedding deltas; arguments as in ``lookup``."""
        embeds = table.take(ids)
        for delta in self._deltas:
            rows = slice(None) if delta.rows is None else delta.rows
            changed = delta.table.lookup(table, ids[rows])
            if modality is not None:
                changed = np.where((modality[rows] == 0)[..., None], changed, embeds[rows])
            embeds[rows] = changed
        return embeds

    def apply(self, embeds: Array, modality: Array | None = None) -> Array:
        """Adapt each row with its adapter.

        Args:
            embeds: shape ``(batch, seq, d)``; not changed. Rows of the base model are returned bit for bit.
            modality: index in the base's modalities for each position, ``(batch, seq)``; ``None`` means text.
        """
        if modality is None and self._whole is not None:
            return self._whole.run(embeds, self._whole_weights)
        groups = self._text if modality is None else self._groups
        if not groups:
            return embeds
        result = embeds.copy()
        for group in groups:
            rows = slice(None) if group.rows is None else group.rows
            adapted = group.graph.run(embeds[rows], group.weights)
            if modality is not None:
                adapted = np.where((modality[rows] == group.modality)[..., None], adapted, result[rows])
            result[rows] = adapted
        return result

    def soft_prompts(self, batch: int) -> list[SoftPrompt | None]:
        """The soft prompt of each row; an empty list if no row has one."""
        return _by_row(self._prompts, batch)

    def kv_prefixes(self, batch: int) -> list[KvPrefix | None]:
        """The KV prefix of each row; an empty list if no row has one."""
        return _by_row(self._kv_prefixes, batch)

    @property
    def kv_prefix(self) -> KvPrefix | None:
        """The KV prefix of a batch of one task."""
        return next((prefix for rows, prefix in self._kv_prefixes if rows is None), None)

    @property
    def needs_ids(self) -> bool:
        """Whether a task needs token ids; embeddings alone are then not enough."""
        return bool(self._deltas)

    def adapters(self, batch: int, modality: int = 0) -> list[tuple[str, str]]:
        """Digest and scope of each row's adapter of one modality; empty strings for none."""
        by_row = [("", "")] * batch
        members: list[AdapterGroup | TokenEmbeddingDelta] = [*(self._deltas if modality == 0 else ())]
        members += [group for group in self._groups if group.modality == modality]
        for member in members:
            for row in range(batch) if member.rows is None else member.rows.tolist():
                by_row[row] = (member.digest, member.scope)
        return by_row

    @property
    def groups(self) -> tuple[AdapterGroup, ...]:
        """The adapter groups, in no particular order."""
        return self._groups

    def generated(self) -> AdapterMapping:
        """The mapping of generated tokens: text only, without tasks of scope ``"prompt"``."""
        return AdapterMapping([group for group in self._text if group.scope == "all"], deltas=self._generated_deltas())

    def for_decoding(self) -> AdapterMapping:
        """As ``generated``, with stacked weights: a step calls each graph once, for any number of tasks."""
        groups, deltas = [group for group in self._text if group.scope == "all"], self._generated_deltas()
        if len(groups) == len(self._groups) <= 1 and len(deltas) == len(self._deltas):
            return self
        by_graph: dict[SharedAdapterGraph, list[AdapterGroup]] = {}
        for group in groups:
            by_graph.setdefault(group.graph, []).append(group)
        stacked = [members[0] if len(members) == 1 else _stack(members) for members in by_graph.values()]
        return AdapterMapping(stacked, deltas=deltas)

    def take(self, kept: Sequence[int]) -> AdapterMapping:
        """The mapping of a batch of the rows ``kept``, in that order, after its soft prompts and KV prefixes."""
        groups = [group for old in self._groups if (group := _take(old, np.asarray(kept))) is not None]
        deltas = []
        for delta in self._deltas:
            rows = None if delta.rows is None else np.flatnonzero(np.isin(kept, delta.rows))
            if rows is None or len(rows):
                deltas.append(replace(delta, rows=rows))
        return AdapterMapping(groups, self._fold, deltas=deltas)

    def _generated_deltas(self) -> list[TokenEmbeddingDelta]:
        return [delta for delta in self._deltas if delta.scope == "all"]


NO_ADAPTER = AdapterMapping(())


def mix(members: Iterable[tuple[AdapterMapping, Array]]) -> AdapterMapping:
    """The mapping of a batch of several tasks.

    Args:
        members: for each task its mapping for a whole batch, and the rows that use it, int64.
    """
    groups: list[AdapterGroup] = []
    deltas: list[TokenEmbeddingDelta] = []
    prompts: list[tuple[Array | None, SoftPrompt]] = []
    kv_prefixes: list[tuple[Array | None, KvPrefix]] = []
    for alone, rows in members:
        groups += [replace(group, rows=rows) for group in alone._groups]
        deltas += [replace(delta, rows=rows) for delta in alone._deltas]
        prompts += [(rows, prompt) for _, prompt in alone._prompts]
        kv_prefixes += [(rows, prefix) for _, prefix in alone._kv_prefixes]
    return AdapterMapping(groups, deltas=deltas, prompts=prompts, kv_prefixes=kv_prefixes)


def combine(rows: Sequence[AdapterMapping]) -> AdapterMapping:
    """The mapping of a batch, from the mapping of each row's task for a whole batch.

    Rows of one task share one object, which is kept as it is for a batch of that task alone.
    """
    if all(alone is rows[0] for alone in rows):
        return rows[0]
    members: dict[int, tuple[AdapterMapping, list[int]]] = {}
    for row, alone in enumerate(rows):
        if alone is not NO_ADAPTER:
            members.setdefault(id(alone), (alone, []))[1].append(row)
    return mix((alone, np.array(numbers)) for alone, numbers in members.values())


def task_groups(adapter: Adapter, modalities: Sequence[str], graph: SharedAdapterGraph) -> list[AdapterGroup]:
    """Adapter groups of a batch of one task; their weights are views of the adapter's.

    Args:
        adapter: the task's adapter.
        modalities: those of the base.
        graph: the shared adapter graph of its activation and bias.
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
    """An adapter's weights of one modality as inputs of the shared adapter graph, for all rows; views, no copies."""
    weights = {name: adapter.weights[f"{modality}.{name}.weight"][None] for name in ("down", "up")}
    if adapter.config.bias:
        weights |= {f"{name}_bias": adapter.weights[f"{modality}.{name}.bias"][None, None] for name in ("down", "up")}
    return weights


def _by_row(members: Sequence[tuple[Array | None, T]], batch: int) -> list[T | None]:
    """What each row has of ``members`` with their rows; an empty list if there are none."""
    if not members:
        return []
    by_row: list[T | None] = [None] * batch
    for rows, member in members:
        for row in range(batch) if rows is None else rows.tolist():
            by_row[row] = member
    return by_row


def _take(group: AdapterGroup, kept: Array) -> AdapterGroup | None:
    """The group reduced to the rows ``kept``; ``None`` if it has none of them."""
    if group.rows is None:
        return group
    members = {row: member for member, row in enumerate(group.rows.tolist())}
    pairs = [(row, members[old]) for row, old in enumerate(kept.tolist()) if old in members]
    if not pairs:
        return None
    rows, sets = (np.array(numbers) for numbers in zip(*pairs, strict=True))
    is_shared = all(len(value) == 1 for value in group.weights.values())
    weights = group.weights if is_shared else {name: value[sets] for name, value in group.weights.items()}
    return replace(group, rows=rows, weights=weights)


def _stack(groups: Sequence[AdapterGroup]) -> AdapterGroup:
    """Stack groups of one graph into one group, with one set of weights for each row.

    Smaller ranks are padded with zeros. That is exact: every activation maps 0 to 0, and zero terms add nothing.
    """
    row_sets = [group.rows for group in groups if group.rows is not None]
    assert len(row_sets) == len(groups), "rows of several tasks are listed"
    rows = np.concatenate(row_sets)
    weights = {}
    for name in groups[0].weights:
        largest = np.max([group.weights[name].shape[1:] for group in groups], axis=0)
        weights[name] = np.zeros((len(rows), *largest), np.float32)
    start = 0
    for group, row_set in zip(groups, row_sets, strict=True):
        stop = start + len(row_set)
        for name, matrix in group.weights.items():
            weights[name][start:stop, : matrix.shape[1], : matrix.shape[2]] = matrix
        start = stop
    return replace(groups[0], rows=rows, weights=weights)
