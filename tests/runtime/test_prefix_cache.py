"""A prompt that begins like an earlier one goes on from there, under the same adapter and no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_support import random_adapter, write_adapter

from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import RequestError
from adalink.runtime.prefix_cache import PrefixCache, PrefixKey

SHARED = "wheat prices rose again"
PROMPTS = [f"{SHARED} today", f"{SHARED} in may", SHARED[:9], f"{SHARED} today"]


@pytest.fixture
def cached(llama: Any) -> Iterator[Deployment]:
    with Deployment.open(llama.folder, threads=1, prefix_cache_bytes=1 << 20) as deployment:
        yield deployment


def plain(llama: Any, prompts: list[str], tasks: Any) -> list[Any]:
    with Deployment.open(llama.folder, threads=1) as deployment:
        return deployment.generate(prompts, tasks=tasks, max_new_tokens=12)


@pytest.mark.parametrize("task", [None, "alpha", "prompted"])
def test_hits_give_the_tokens_of_a_whole_run(llama: Any, cached: Deployment, resumed: list[int], task: Any) -> None:
    expected = plain(llama, PROMPTS, task)
    found = [cached.generate([prompt], tasks=task, max_new_tokens=12)[0] for prompt in PROMPTS]
    assert found == expected
    lengths = [len(cached.tokenizer.encode(text)) for text in (f"{SHARED} ", SHARED[:9], PROMPTS[0])]
    assert resumed == [lengths[0], lengths[1] - 1, lengths[2] - 1], "all that is common, but for the last token"
    assert cached.generate(PROMPTS, tasks=task, max_new_tokens=12) == expected, "and together in one batch"


def test_a_prefix_is_never_used_under_another_adapter(llama: Any, cached: Deployment, resumed: list[int]) -> None:
    tasks = ["alpha", None, "beta", "prompted"]
    for task in tasks:
        assert cached.generate(PROMPTS[:1], tasks=task, max_new_tokens=12) == plain(llama, PROMPTS[:1], task)
    assert not resumed, "four adapters, no prefix in common"
    mixed = [PROMPTS[0]] * 4
    assert cached.generate(mixed, tasks=tasks, max_new_tokens=12) == plain(llama, mixed, tasks)
    assert len(resumed) == 4
    assert min(resumed) > 0, "the same tasks again: each its own"


def test_a_prefix_of_the_wrong_adapter_would_show(llama: Any, cached: Deployment, monkeypatch: Any) -> None:
    """The planted fault: a cache that keys by tokens alone."""
    expected = plain(llama, PROMPTS[:1], "beta")
    monkeypatch.setattr(PrefixKey, "__eq__", lambda self, other: True)
    monkeypatch.setattr(PrefixKey, "__hash__", lambda self: 1)
    cached.generate(PROMPTS[:1], tasks="alpha", max_new_tokens=12)
    assert cached.generate(PROMPTS[:1], tasks="beta", max_new_tokens=12) != expected


def test_a_name_that_stands_for_another_adapter_hits_nothing(
    llama: Any, cached: Deployment, resumed: list[int], tmp_path: Path
) -> None:
    base = cached.manifest.base
    for seed in (50, 51):
        adapter = random_adapter(base.fingerprint, base.hidden_size, seed, **SETTINGS)
        cached.add_task(write_adapter(tmp_path / str(seed), adapter), "changing")
        cached.generate(PROMPTS[:1], tasks="changing", max_new_tokens=2)
        cached.remove_task("changing")
    assert not resumed


SETTINGS = {"rank": 3, "activation": "gelu", "bias": False, "scope": "all"}


def test_least_recently_used_go_first_and_the_budget_holds() -> None:
    states = np.zeros((4, 2, 3, 5), np.float32)
    cache, key = PrefixCache(3 * states.nbytes), PrefixKey("base", "adapter", "all")
    prompts = [np.array([i, i, i]) for i in range(5)]
    for prompt in prompts[:3]:
        cache.add(key, prompt, states)
    assert cache.find(key, prompts[0]) is not None
    cache.add(key, prompts[3], states)
    assert cache.find(key, prompts[1]) is None, "the one not used since"
    assert [cache.find(key, prompts[i]).shape[2] for i in (0, 2, 3)] == [2, 2, 2]  # type: ignore[union-attr]
    cache.add(key, prompts[3], states)
    assert cache.size_bytes == 3 * states.nbytes
    cache.add(key, prompts[4], np.zeros((4, 2, 3, 50), np.float32))
    assert cache.find(key, prompts[4]) is None, "larger than the budget"
    assert cache.size_bytes == 3 * states.nbytes
    for other in (PrefixKey("other", "adapter", "all"), PrefixKey("base", "b", "all"), PrefixKey("base", "", "")):
        assert cache.find(other, prompts[0]) is None


def test_bases_that_cannot_go_on_say_so(t5: Any, llama: Any) -> None:
    with pytest.raises(RequestError, match=r"prefix_cache_bytes is 9.*--target onnxruntime-cpu"):
        Deployment.open(t5.folder, prefix_cache_bytes=9)
    with pytest.raises(RequestError, match="prefix_cache_bytes is -1"):
        Deployment.open(llama.folder, prefix_cache_bytes=-1)
