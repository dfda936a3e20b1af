"""Caches grow with the text: a limit of new tokens may be any number, and growth changes no token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.runtime import reseal
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.base.export import export_base
from adalink.runtime import Deployment
from adalink.runtime.errors import RequestError
from adalink.runtime.generation import admission
from adalink.runtime.ort import dynamic_cache, static_buffers, static_cache
from adalink.runtime.ort.static_cache import StaticCacheDecodeState
from adalink.runtime.storage.manifest_io import read_manifest

PROMPTS = ["wheat prices", "Q", "oil"]


def without_limit(folder: Path, family: str, target: str) -> Deployment:
    """A base without a position limit, whose rows end at a common letter."""
    export_base(FAMILIES[family](), folder, tokenizer=make_tokenizer(), target=target)
    reseal(folder, base=msgspec.structs.replace(read_manifest(folder).base, max_positions=None))
    return Deployment.open(folder, threads=1)


@pytest.mark.parametrize(
    ("family", "target"), [("llama", "onnxruntime-cpu"), ("llama", "portable"), ("t5", "portable")]
)
def test_a_huge_limit_takes_no_memory(tmp_path: Path, family: str, target: str) -> None:
    """Rows end long before: tokens that they come to are made their ends."""
    folder = tmp_path / "deployment"
    with without_limit(folder, family, target) as deployment:
        expected = [row.token_ids for row in deployment.generate(PROMPTS, max_new_tokens=30)]
    ends = tuple({tokens[min(5, len(tokens) - 1)] for tokens in expected} | {2})
    reseal(folder, base=msgspec.structs.replace(read_manifest(folder).base, eos_token_ids=ends))
    with Deployment.open(folder, threads=1) as deployment:
        for limit in (10**9, 10**30):
            for row, tokens in zip(deployment.generate(PROMPTS, max_new_tokens=limit), expected, strict=True):
                assert row.finish_reason == "stop"
                assert row.token_ids == tokens[: next(at for at, token in enumerate((*tokens, 2)) if token in ends)]


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "portable"])
@pytest.mark.parametrize("draft_tokens", [0, 8])
def test_growth_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, draft_tokens: int
) -> None:
    with without_limit(tmp_path / "deployment", "gpt2", target) as deployment:
        settings: dict[str, Any] = {"max_new_tokens": 40, "draft_tokens": draft_tokens}
        expected = deployment.generate(PROMPTS, **settings), deployment.generate(PROMPTS[:1], **settings)
        for room in (1, 3):
            make_small(monkeypatch, room)
            monkeypatch.setattr(dynamic_cache, "_GROWTH", room)
            found = deployment.generate(PROMPTS, **settings), deployment.generate(PROMPTS[:1], **settings)
            assert found == expected


def make_small(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """A cache has room for so few new tokens at first."""
    for module in (static_cache, admission):
        monkeypatch.setattr(module, "FIRST_TOKENS", tokens)


def test_a_cache_that_is_not_copied_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with without_limit(tmp_path / "deployment", "llama", "onnxruntime-cpu") as deployment:
        expected = deployment.generate(PROMPTS, max_new_tokens=20)
        make_small(monkeypatch, 2)
        grow = StaticCacheDecodeState._grow

        def forget(self: StaticCacheDecodeState, slots: int, capacity: int) -> None:
            grow(self, slots, capacity)
            self._cache[:] = 0

        monkeypatch.setattr(StaticCacheDecodeState, "_grow", forget)
        assert deployment.generate(PROMPTS, max_new_tokens=20) != expected


@pytest.mark.parametrize("shape", [(2, 1, 1, 1 << 50, 8), (2, 1, 1, 1 << 62, 8)])
def test_memory_that_is_not_there_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"no memory for a KV cache of 1 rows of \d+ tokens .*: send fewer rows"):
        static_buffers.empty_cache(shape, np.dtype(np.float32))
