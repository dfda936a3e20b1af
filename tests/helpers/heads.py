"""Seeded tasks with heads of every kind, on a tiny encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.runtime import random_adapter, write_adapter
from helpers.sentences import save_encoder

from adalink.export.adapter.export import export_adapters
from adalink.export.base.export import export_base
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TOKENS, Head

LABELS = {
    SINGLE_LABEL: ("oil", "grain", "trade"),
    MULTI_LABEL: ("red", "green", "blue", "black", "white"),
    REGRESSION: ("value",),
    TOKENS: ("O", "B-LOC", "I-LOC", "B-PER", "I-PER"),
}
_PLAIN = {"rank": 3, "activation": "gelu", "bias": True, "scope": "all"}
_ALONE = {"rank": 0, "activation": "identity", "bias": False, "scope": "all"}


def make_head(kind: str, pooling: str = "mean", max_tokens: int = 24) -> Head:
    pooling = "" if kind == TOKENS else pooling
    return Head(problem_type=kind, labels=LABELS[kind], pooling=pooling, max_tokens=max_tokens)


# Task -> settings of its adapter: each kind of head, with and without a bottleneck, one behind a soft prompt.
TASKS: dict[str, dict[str, Any]] = {
    "topics": {**_PLAIN, "head": make_head(SINGLE_LABEL)},
    "colours": {**_PLAIN, "rank": 2, "head": make_head(MULTI_LABEL, "cls", 9)},
    "rating": {**_PLAIN, "soft_tokens": 3, "head": make_head(REGRESSION, "max")},
    "names": {**_PLAIN, "activation": "tanh", "head": make_head(TOKENS)},
    "frozen": {**_ALONE, "head": make_head(SINGLE_LABEL, "lasttoken")},
    "plain": _PLAIN,
}


def make_head_deployment(root: Path) -> tuple[Path, Path, dict[str, Adapter]]:
    """A model folder, its deployment with ``TASKS``, and their adapters, whose folders are in ``root``."""
    model, out = save_encoder(root / "tiny"), root / "out"
    base = export_base(model, out).base
    adapters = {
        name: random_adapter(base.fingerprint, base.hidden_size, seed, **settings)
        for seed, (name, settings) in enumerate(TASKS.items())
    }
    export_adapters({name: write_adapter(root / name, adapter) for name, adapter in adapters.items()}, out)
    return model, out, adapters
