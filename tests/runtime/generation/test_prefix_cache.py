"""A prompt that begins like an earlier one goes on from there, under the same adapter and no other."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runtime import random_adapter, write_adapter

from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import RequestError
from adalink.runtime.generation import admission
from adalink.runtime.generation.prefix_cache import PrefixCache, PrefixKey
from adalink.runtime.storage.digest import cache_key

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


def test_a_prompt_kept_again_takes_no_ones_place() -> None:
    states = np.zeros((4, 2, 3, 5), np.float32)
    cache, key = PrefixCache(2 * states.nbytes), PrefixKey("base", "adapter", "all")
    first, second = np.array([1, 2, 3]), np.array([4, 5, 6])
    for prompt in (first, second, second):
        cache.add(key, prompt, states)
    assert cache.size_bytes == 2 * states.nbytes
    assert cache.find(key, first) is not None
    assert cache.find(key, second) is not None


def test_states_as_large_as_the_budget_are_kept_alone() -> None:
    states = np.zeros((4, 2, 3, 5), np.float32)
    cache, key = PrefixCache(states.nbytes), PrefixKey("base", "adapter", "all")
    for prompt in (np.array([1, 2, 3]), np.array([4, 5, 6])):
        cache.add(key, prompt, states)
        assert cache.find(key, prompt) is not None
        assert cache.size_bytes == states.nbytes


def test_threads_find_and_keep_at_once() -> None:
    states = np.zeros((2, 1, 3, 4), np.float32)
    cache, key, failures = PrefixCache(20 * states.nbytes), PrefixKey("base", "adapter", "all"), list[str]()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(200):
                prompt = rng.integers(0, 4, 3)
                cache.add(key, prompt, states)
                found = cache.find(key, prompt)
                if found is not None and found.shape[2] > 2:
                    failures.append(f"{found.shape}")
        except Exception as error:
            failures.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert cache.size_bytes == sum(kept.value.nbytes for kept in cache._kept.entries.values()) == 20 * states.nbytes


def test_what_was_kept_does_not_change_when_rows_of_its_batch_go(llama: Any, cached: Deployment) -> None:
    """The first row ends at once, and the last one's cache takes its place."""
    prompts = [PROMPTS[0], "oil", "a bank raised its dividend"]
    expected = plain(llama, prompts, "alpha")
    first = expected[0].text[0]
    assert all(first not in row.text for row in expected[1:])
    cached.generate(prompts, tasks="alpha", max_new_tokens=12, stop=first)
    assert cached.generate(prompts, tasks="alpha", max_new_tokens=12) == expected


def test_names_of_what_is_no_token_do_not_meet() -> None:
    names = [cache_key(f"image {number}") for number in range(5000)]
    assert len(set(names)) == len(names)
    assert -(1 << 63) <= min(names) < -(1 << 62)
    assert max(names) < 0


def test_bases_that_cannot_go_on_say_so(t5: Any, llama: Any) -> None:
    with pytest.raises(RequestError, match=r"prefix_cache_bytes is 9.*--target onnxruntime-cpu"):
        Deployment.open(t5.folder, prefix_cache_bytes=9)
    with pytest.raises(RequestError, match="prefix_cache_bytes is -1"):
        Deployment.open(llama.folder, prefix_cache_bytes=-1)


def test_a_prompt_of_several_pieces_hits_too(
    llama: Any, cached: Deployment, resumed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt is read by itself, in pieces: what is known of it is still not read again."""
    monkeypatch.setattr(admission, "PASS_TOKENS", 8)
    expected = plain(llama, PROMPTS[:2], "alpha")
    assert [cached.generate([prompt], tasks="alpha", max_new_tokens=12)[0] for prompt in PROMPTS[:2]] == expected
    assert resumed == [len(cached.tokenizer.encode(f"{SHARED} "))]
