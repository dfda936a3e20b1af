"""Drafts: guesses change how soon a text comes, and nothing else."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.export import skip_windows_of_old
from helpers.runtime import build
from helpers.tiny_tokenizer import CHARACTERS, make_tokenizer

from adalink.export.base.export import export_base
from adalink.runtime import Deployment
from adalink.runtime.errors import BackendError
from adalink.runtime.generation.sequence import Generation
from adalink.runtime.generation.speculative_decoding import PromptLookup
from adalink.runtime.ort.static_cache import StaticCacheDecodeState
from adalink.runtime.sampling.sampler import SamplingParams

PROMPTS = ["A bank raised", "wheat wheat wheat", "Q", "crude oil, 1987"]
STEPS = 24


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Tokens of each pass that checked guesses, and how many were then taken back."""
    seen: list[tuple[int, int]] = []
    verify, rollback = StaticCacheDecodeState.verify, StaticCacheDecodeState.rollback

    def note_verify(self: StaticCacheDecodeState, embeds: Any) -> Any:
        seen.append((embeds.shape[1], 0))
        return verify(self, embeds)

    def note_rollback(self: StaticCacheDecodeState, count: int) -> None:
        if seen:
            seen[-1] = (seen[-1][0], count)
        rollback(self, count)

    monkeypatch.setattr(StaticCacheDecodeState, "verify", note_verify)
    monkeypatch.setattr(StaticCacheDecodeState, "rollback", note_rollback)
    return seen


def prophesy(monkeypatch: pytest.MonkeyPatch, known: list[int], seed: int = 1) -> None:
    """Guesses that are right up to a random place: the text that follows is known."""
    draw = random.Random(seed)

    def draft(self: PromptLookup, max_new_tokens: int) -> list[int]:
        done = len(self._tokens)
        right = known[done : done + draw.randrange(5)]
        wrong = [(token + 1) % 90 + 4 for token in known[done + len(right) :][: draw.randrange(4)]]
        return (right + wrong)[:max_new_tokens]

    monkeypatch.setattr(PromptLookup, "draft", draft)


def encode(text: str) -> list[int]:
    return [CHARACTERS.index(character) + 4 for character in text]


# A token for each letter.
TEXT = [ord(letter) for letter in "the cat and the dog and the c"]


def test_guesses_are_what_followed_the_longest_match_the_last_time() -> None:
    lookup = PromptLookup(TEXT, 8)
    assert bytes(lookup.draft(8)) == b"at"  # "e c" stood once before; two guesses to begin with
    assert bytes(lookup.draft(1)) == b"a"
    assert lookup.draft(0) == []
    lookup.push(ord("d"))  # "cd" and " cd" are new: what followed "d" the last time
    assert bytes(lookup.draft(2)) == b" t"
    lookup.push(ord("x"))
    assert lookup.draft(8) == []


def test_the_number_of_guesses_follows_their_luck() -> None:
    lookup = PromptLookup([1, 2] * 20, 8)
    sizes = []
    for right in (2, 4, 8, 8, 3, 0, 1, 1):
        sizes.append(len(lookup.draft(8)))
        lookup.update(sizes[-1], min(right, sizes[-1]))
    assert sizes == [2, 4, 8, 8, 8, 4, 1, 2]
    assert len(PromptLookup([1, 1, 1], 1).draft(8)) == 1


def test_guesses_equal_a_search_through_the_text() -> None:
    draw = random.Random(4)
    tokens = [draw.randrange(4) for _ in range(300)]
    lookup = PromptLookup(tokens[:5], 2)
    for end in range(5, 300):
        expected: list[int] = []
        for length in (3, 2, 1):
            tail = tokens[end - length : end]
            starts = [at for at in range(end - length) if tokens[at : at + length] == tail]
            if starts:
                after = starts[-1] + length
                expected = (tokens[after:end] * 2)[:2]
                break
        assert lookup.draft(2) == expected
        lookup.push(tokens[end])


@pytest.mark.parametrize("task", [None, "alpha", "beta", "prompted"])
@pytest.mark.parametrize("draft_tokens", [1, 3, 8])
def test_the_text_is_pytorchs(
    llama: Any, deployment: Deployment, passes: list[tuple[int, int]], task: str | None, draft_tokens: int
) -> None:
    for prompt in PROMPTS[:2]:
        expected = llama.greedy(encode(prompt), task, STEPS)
        result = deployment.generate([prompt], tasks=task, max_new_tokens=STEPS, draft_tokens=draft_tokens)[0]
        assert list(result.token_ids) == expected
    assert passes
    assert max(count for count, _ in passes) <= 1 + draft_tokens


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma", "gemma3", "mistral", "phi3", "gpt2"]
)  # fmt: skip
def test_right_and_wrong_guesses_of_every_family(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[tuple[int, int]]
) -> None:
    """Windows, norms of queries, rotary and learned positions: passes over several tokens are as steps."""
    skip_windows_of_old(family)
    tiny = build(family, tmp_path)
    with Deployment.open(tiny.folder) as opened:
        for task in (None, "alpha", "prompted"):
            expected = opened.generate(PROMPTS[:1], tasks=task, max_new_tokens=40, draft_tokens=0)[0]
            assert list(expected.token_ids) == tiny.greedy(encode(PROMPTS[0]), task, 40)
            prophesy(monkeypatch, encode(PROMPTS[0]) + list(expected.token_ids))
            passes.clear()
            assert opened.generate(PROMPTS[:1], tasks=task, max_new_tokens=40) == [expected]
            assert sum(count for count, _ in passes) > len(passes) < len(expected.token_ids)
            made = 1  # by the prompt
            for count, taken_back in passes:
                assert made + count <= 40, "guesses for which no room is left"
                made += count - taken_back
            assert any(taken_back for _, taken_back in passes[:-1])


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "wrong guesses stay": ("rollback", lambda self, count: None),
    "positions of wrong guesses stay": ("rollback", lambda self, count: self._lengths.__isub__(count)),
    "logits of other tokens": (
        "verify",
        lambda *given, verify=StaticCacheDecodeState.verify: verify(*given)[::-1].copy(),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_would_show(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With learned positions, which are an input: rotary ones follow from the length of the cache."""
    changed = 0
    with Deployment.open(build("gpt2", tmp_path).folder) as opened:
        for prompt, task in itertools.product(PROMPTS, ("alpha", "beta", None)):
            with monkeypatch.context() as patch:
                expected = opened.generate([prompt], tasks=task, max_new_tokens=STEPS, draft_tokens=0)
                prophesy(patch, encode(prompt) + list(expected[0].token_ids))
                assert opened.generate([prompt], tasks=task, max_new_tokens=STEPS) == expected
                patch.setattr(StaticCacheDecodeState, *FAULTS[fault])
                try:
                    changed += opened.generate([prompt], tasks=task, max_new_tokens=STEPS) != expected
                except BackendError:  # no room left in the cache
                    changed += 1
    assert changed > 3


def test_sampling_draws_the_same(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, passes: list[tuple[int, int]]
) -> None:
    settings: dict[str, Any] = {"max_new_tokens": STEPS, "tasks": "alpha"}

    def sampled(seed: int) -> SamplingParams:
        return SamplingParams(temperature=1.5, top_k=30, seed=seed)

    for seed in range(4):
        expected = deployment.generate(PROMPTS[1:2], **settings, sampling=sampled(seed), draft_tokens=0)
        prophesy(monkeypatch, encode(PROMPTS[1]) + list(expected[0].token_ids), seed)
        passes.clear()
        assert deployment.generate(PROMPTS[1:2], **settings, sampling=sampled(seed)) == expected
        assert len(passes) < len(expected[0].token_ids)
    assert deployment.generate(PROMPTS[1:2], **settings, sampling=sampled(99)) != expected


def test_the_last_row_of_a_batch_goes_on_by_drafts(deployment: Deployment, passes: list[tuple[int, int]]) -> None:
    """Whichever row is the last, wherever its cache has come to lie."""
    tasks = ["alpha", None, "prompted", "beta"]
    whole = deployment.generate(PROMPTS, tasks=tasks, max_new_tokens=STEPS, draft_tokens=0)
    last = 0
    for survivor in range(4):
        stops = sorted({row.text[3:6] for place, row in enumerate(whole) if place != survivor} - {""})
        expected = deployment.generate(PROMPTS, tasks=tasks, max_new_tokens=STEPS, stop=stops, draft_tokens=0)
        passes.clear()
        assert deployment.generate(PROMPTS, tasks=tasks, max_new_tokens=STEPS, stop=stops) == expected
        last += bool(passes)
    assert last >= 2


def test_ends_within_a_pass(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget, a stop text, an end token: whatever was guessed beyond is not there, nor streamed."""

    def generate(drafts: int | None, **settings: Any) -> tuple[Generation, str]:
        pieces: list[str] = []
        found = deployment.generate(
            PROMPTS[:1],
            tasks="alpha",
            draft_tokens=drafts,
            stream=lambda row, piece: pieces.append(piece),
            **settings,
        )
        return found[0], "".join(pieces)

    whole, _ = generate(0, max_new_tokens=64 - len(PROMPTS[0]))
    known = encode(PROMPTS[0]) + list(whole.token_ids) + [9] * 9
    monkeypatch.setattr(
        PromptLookup, "draft", lambda self, max_new_tokens: known[len(self._tokens) :][: min(max_new_tokens, 6)]
    )
    for budget in (1, 2, 5, 7, 64 - len(PROMPTS[0])):
        assert generate(None, max_new_tokens=budget) == generate(0, max_new_tokens=budget)
    for start in range(2, 8):
        stop = whole.text[start : start + 2]
        assert generate(None, max_new_tokens=20, stop=stop) == generate(0, max_new_tokens=20, stop=stop)


@pytest.mark.parametrize(
    ("changes", "can_check"),
    [({"target": "portable"}, False), ({"quantization": "int8"}, True), ({"dtype": "float16"}, True)],
)
def test_no_drafts_where_they_could_not_be_checked_or_might_change_the_text(
    llama: Any, passes: list[tuple[int, int]], tmp_path: Path, changes: dict[str, Any], can_check: bool
) -> None:
    """A graph whose cache grows has none; a quantised one, or one in 16 bits, has them when asked for."""
    export_base(llama.model, tmp_path / "deployment", tokenizer=make_tokenizer(), **changes)
    with Deployment.open(tmp_path / "deployment") as opened:
        expected = opened.generate(PROMPTS[1:2], max_new_tokens=STEPS, draft_tokens=0)
        assert opened.generate(PROMPTS[1:2], max_new_tokens=STEPS) == expected
        assert not passes
        opened.generate(PROMPTS[1:2], max_new_tokens=STEPS, draft_tokens=3)
        assert bool(passes) == can_check


def test_prompts_whose_beginning_was_kept(llama: Any, deployment: Deployment, passes: list[tuple[int, int]]) -> None:
    expected = deployment.generate(PROMPTS[1:2], tasks="beta", max_new_tokens=STEPS, draft_tokens=0)
    with Deployment.open(llama.folder, prefix_cache_bytes=1 << 20) as opened:
        for _ in range(2):
            assert opened.generate(PROMPTS[1:2], tasks="beta", max_new_tokens=STEPS) == expected
    assert passes
