"""llama.cpp behind the runtime, fed embeddings, against PyTorch: architectures, mixed rows, faults that would show."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.llama_cpp import BACKEND, build_gguf
from helpers.runtime import Tiny
from helpers.served import wait_for

from adalink.runtime import Deployment, Request
from adalink.runtime.errors import BackendError, RequestError
from adalink.runtime.generation.handle import Handle
from adalink.runtime.llama_cpp.context import LlamaContext
from adalink.runtime.llama_cpp.sequences import Sequences

# Float32 through two layers: sums of at most 256 terms, six in a row, of logits around 10.
LIMIT = 256 * 6 * 2**-24 * 10
# llama.cpp looks GELU up in a table: what goes in and what comes out are in half precision.
GELU_LIMIT = 2 * 2**-11 * 10
TASKS = [None, "alpha", "beta", "prompted"]


def random_ids(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(4, 96, length)]


def check_rows(tiny: Tiny, opened: Deployment) -> float:
    """Largest deviation of a batch of all tasks, padded on the left, from each row alone in PyTorch."""
    rows = [random_ids(length, seed=length) for length in (3, 9, 6, 5)]
    ids, mask = np.zeros((4, 9), np.int64), np.zeros((4, 9), np.int64)
    for index, row in enumerate(rows):
        ids[index, 9 - len(row) :], mask[index, 9 - len(row) :] = row, 1
    logits = opened.run(input_ids=ids, attention_mask=mask, tasks=TASKS)["logits"]
    pairs = zip(logits, rows, TASKS, strict=True)
    return max(float(np.abs(one[9 - len(row) :] - tiny.logits(row, task)).max()) for one, row, task in pairs)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3", "phi3"])
def test_architectures_give_pytorchs_logits(family: str, tmp_path: Path) -> None:
    """Gemma 3 multiplies what it looks up, and not what it is fed."""
    tiny = build_gguf(tmp_path, family)
    with Deployment.open(tiny.folder, BACKEND, threads=1) as opened:
        assert check_rows(tiny, opened) < (GELU_LIMIT if family == "gemma3" else LIMIT)


def test_rows_of_mixed_tasks(gguf: Tiny, opened: Deployment) -> None:
    assert check_rows(gguf, opened) < LIMIT
    prompts = [random_ids(length, seed=length) for length in (4, 11, 7, 6)]
    replies = opened.generate(prompts, tasks=TASKS, max_new_tokens=10)
    expected = [gguf.greedy(prompt, task, 10) for prompt, task in zip(prompts, TASKS, strict=True)]
    assert [list(reply.token_ids) for reply in replies] == expected


def test_rows_that_join_leave_and_begin_in_the_cache(gguf: Tiny, opened: Deployment) -> None:
    """Three slots and eight requests, twice: each is as if it were alone, whatever it shares with others."""
    shared = random_ids(6, 1)
    rows = [([*shared, *random_ids(2 + at, at)], TASKS[at % 4], 3 + 2 * (at % 5)) for at in range(8)]
    expected = [gguf.greedy(prompt, task, budget) for prompt, task, budget in rows]
    for _ in range(2):
        handles = [opened.submit(Request(prompt, task=task, max_new_tokens=budget)) for prompt, task, budget in rows]
        assert [list(handle.result(60).token_ids) for handle in handles] == expected
    again = opened.generate([rows[1][0]], tasks=rows[1][1], max_new_tokens=4)[0]
    assert again.cached_tokens == len(rows[1][0]) - 1


def test_drafts_are_verified_in_one_pass(gguf: Tiny, opened: Deployment) -> None:
    prompt = random_ids(4, 3) * 3
    expected = gguf.greedy(prompt, "alpha", 14)
    for drafts in (0, 6):
        reply = opened.generate([prompt], tasks="alpha", max_new_tokens=14, draft_tokens=drafts)[0]
        assert list(reply.token_ids) == expected


def test_memory_grows_with_rows_and_lengths(gguf: Tiny) -> None:
    """Without slots or a context, sequences move to larger caches while others are in the batch."""
    with Deployment.open(gguf.folder, BACKEND, threads=1) as opened:
        sequences = opened._runner.engine.sequences  # type: ignore[attr-defined]
        held, ids = sequences.take(1, 8), random_ids(6)
        embeds = gguf.embeds(ids, "alpha")[0].detach().numpy()
        sequences.decode(embeds[:5], held * 5, range(5), [4])
        for count in (2, 7):
            prompts = [random_ids(3 + at, at) for at in range(count)]
            replies = opened.generate(prompts, tasks="beta", max_new_tokens=6)
            assert [list(reply.token_ids) for reply in replies] == [gguf.greedy(one, "beta", 6) for one in prompts]
        sequences.reserve(0, 300)
        logits = sequences.decode(embeds[5:], held, [5], [0])
        assert np.abs(logits - gguf.logits(ids, "alpha")[-1:]).max() < LIMIT, "what it held has moved along"
        assert sequences._context.capacity >= 300
        sequences.give_back(held)
        assert not sequences._held, "every row has given back its own"


@pytest.mark.parametrize("task", [None, "alpha"])
def test_labels_share_the_prompt(
    gguf: Tiny, opened: Deployment, monkeypatch: pytest.MonkeyPatch, task: str | None
) -> None:
    """Copies of a sequence go on by themselves, and all are given back."""
    labels, prompt = [" oil", " oil and gas", " x", " wheat"], "the price of oil"
    (one,) = opened.classify([prompt], task, labels=labels)
    read, scores = opened.tokenizer.encode(prompt), []
    for label in labels:
        ids = opened.tokenizer.encode_plain(label)
        exact = gguf.logits([*read, *ids], task)[len(read) - 1 :].astype(np.float64)
        shares = exact - np.logaddexp.reduce(exact, axis=1)[:, None]
        ends = np.logaddexp.reduce(shares[-1, list(opened.manifest.base.eos_token_ids)])
        scores.append(shares[range(len(ids)), ids].sum() + ends)
    expected = np.exp(scores - np.logaddexp.reduce(scores))
    assert list(one.probabilities.values()) == pytest.approx(expected, abs=2e-4)
    sequences = opened._runner.engine.sequences  # type: ignore[attr-defined]
    assert not sequences._held
    monkeypatch.setattr(LlamaContext, "copy", lambda *_: (_ for _ in ()).throw(BackendError("planted")))
    with pytest.raises(BackendError, match="planted"):
        opened.classify([prompt], task, labels=labels)
    assert not sequences._held


def test_nothing_is_made_of_a_closed_model(gguf: Tiny) -> None:
    """Weights go together with the caches: a thread that is computing is refused, and does not end the process."""
    opened = Deployment.open(gguf.folder, BACKEND, threads=1)
    sequences = opened._runner.engine.sequences  # type: ignore[attr-defined]
    sequences.close()
    with pytest.raises(RequestError, match="the deployment is closed"):
        sequences.take(1, 8)
    opened.close()


@pytest.mark.parametrize("fault", ["load", "read", "cancel"])
def test_prompts_that_are_not_read_to_their_end_give_back_their_sequence(
    opened: Deployment, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A number that stays taken is a row less for everybody, until none is left."""
    prompt, sequences = random_ids(9, 5), opened._runner.engine.sequences  # type: ignore[attr-defined]
    opened.generate([prompt], max_new_tokens=2)
    load, is_sent, handles = Sequences.load, threading.Event(), list[Handle]()

    def planted(self: Sequences, number: int, states: Any) -> None:
        load(self, number, states)
        is_sent.wait(60)
        if fault == "load":
            raise BackendError("planted")
        if fault == "cancel":
            handles[0].cancel()

    monkeypatch.setattr(Sequences, "load", planted)
    if fault == "read":
        monkeypatch.setattr(Sequences, "decode", lambda *_: (_ for _ in ()).throw(BackendError("planted")))
    handles.append(opened.submit(Request(prompt, max_new_tokens=2)))
    is_sent.set()
    if fault == "cancel":
        assert handles[0].result(60).finish_reason == "cancelled"
    else:
        with pytest.raises(BackendError, match="planted"):
            handles[0].result(60)
    wait_for(lambda: not sequences._held, 10)


FAULTS = {
    "sequence": lambda embeds, numbers, positions: (embeds, list(numbers)[::-1], positions),
    "position": lambda embeds, numbers, positions: (embeds, numbers, [at + (at > 5) for at in positions]),
    "task": lambda embeds, numbers, positions: (embeds[::-1], numbers, positions),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_would_show(gguf: Tiny, opened: Deployment, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Planted in the decode steps: another row's sequence, a position off by one, another task's rows."""
    prompts = [random_ids(5, seed=seed) for seed in (11, 12)]
    expected = [gguf.greedy(prompt, task, 8) for prompt, task in zip(prompts, ("alpha", "beta"), strict=True)]
    decode = LlamaContext.decode

    def faulty(self: LlamaContext, embeds: Any, numbers: Any, positions: Any, wanted: Any) -> Any:
        if len(embeds) == 2:
            embeds, numbers, positions = FAULTS[fault](embeds, numbers, positions)
        return decode(self, embeds, numbers, positions, wanted)

    def tokens() -> list[list[int]]:
        replies = opened.generate(prompts, tasks=["alpha", "beta"], max_new_tokens=8)
        return [list(reply.token_ids) for reply in replies]

    assert tokens() == expected
    monkeypatch.setattr(LlamaContext, "decode", faulty)
    if fault == "position":  # llama.cpp itself wants positions without gaps
        with pytest.raises(BackendError, match="with code -1"):
            tokens()
    else:
        assert tokens() != expected


def test_embeddings_that_are_multiplied_again(gguf: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """As llama.cpp's graphs of Gemma and Gemma 2 do with what they are fed: found at the opening, and divided out."""
    decode = LlamaContext.decode

    def multiplied(self: LlamaContext, embeds: Any, numbers: Any, positions: Any, wanted: Any) -> Any:
        embeds = embeds * np.float32(8) if embeds.ndim == 2 else embeds
        return decode(self, embeds, numbers, positions, wanted)

    monkeypatch.setattr(LlamaContext, "decode", multiplied)
    with Deployment.open(gguf.folder, BACKEND, threads=1) as opened:
        assert check_rows(gguf, opened) < LIMIT


def test_positions_are_those_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions are relative; GPT-2 has a table of them, in which a shift of all would show."""
    tiny, decode = build_gguf(tmp_path, "gpt2"), LlamaContext.decode
    with Deployment.open(tiny.folder, BACKEND, threads=1) as opened:
        assert check_rows(tiny, opened) < GELU_LIMIT
        monkeypatch.setattr(
            LlamaContext, "decode", lambda self, a, b, at, d: decode(self, a, b, [one + 1 for one in at], d)
        )
        assert check_rows(tiny, opened) > 20 * GELU_LIMIT
