"""Nested adapters: ``task@8`` is the task ``task`` with the first 8 dimensions of its bottleneck."""

from __future__ import annotations

import msgspec

from adalink.runtime.errors import RequestError
from adalink.runtime.storage.adapter import Adapter, make_adapter
from adalink.runtime.storage.adapter_spec import AdapterSpec, rank_of, show_rank
from adalink.runtime.storage.known_tasks import MARK, split_name


def narrow(adapter: Adapter, name: str) -> Adapter:
    """The adapter that a task's name asks for.

    Args:
        adapter: of the task.
        name: name of the task, such as ``"topics"`` for all of it, or ``"topics@8"``.

    Raises:
        RequestError: as ``check_width``.
    """
    check_width(name, adapter.config)
    width = split_name(name)[1]
    return adapter if width is None else first_dimensions(adapter, width)


def check_width(name: str, settings: AdapterSpec) -> None:
    """Check that a task has as many dimensions as its name asks for.

    Args:
        name: as of ``narrow``.
        settings: the task's.

    Raises:
        RequestError: the task is not nested, or no modality has so many dimensions.
    """
    task, width = split_name(name)
    if width is None:
        return
    if not settings.nested:
        raise RequestError(
            f"task {name!r}: {task!r} is not nested, so that no part of it is a task: ask for {task!r}, or order its "
            "dimensions with adalink compress"
        )
    most = max(rank_of(settings.rank, modality) for modality in settings.modalities)
    if width > most:
        raise RequestError(
            f"task {name!r}: {task!r} has rank {show_rank(settings.rank)}, expected 1 to {most} behind {MARK!r}"
        )


def first_dimensions(adapter: Adapter, width: int | dict[str, int]) -> Adapter:
    """The adapter of the first dimensions of one whose dimensions are ordered.

    Args:
        adapter: the adapter.
        width: how many, for all modalities or for each; a modality that has fewer keeps its own.
    """
    config = adapter.config
    ranks = {name: min(rank_of(width, name), rank_of(config.rank, name)) for name in config.modalities}
    weights = dict(adapter.weights)
    for name, kept in ranks.items():
        for part in ("down.weight", "down.bias"):
            if (tensor := f"{name}.{part}") in weights:
                weights[tensor] = weights[tensor][:kept]
        weights[f"{name}.up.weight"] = weights[f"{name}.up.weight"][:, :kept]
    same = len(set(ranks.values())) == 1
    rank = next(iter(ranks.values())) if same else ranks
    return make_adapter(msgspec.structs.replace(config, rank=rank), weights, "nested adapter")
