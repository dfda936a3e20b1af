"""Presence and frequency penalties and logit biases: OpenAI's formulas, written out here in float64 and loops.

Their place among the other processors is vLLM's: biases, then the repetition penalty, then frequency and presence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers.tiny_tokenizer import CHARACTERS

from adalink.runtime import Deployment, Request, SamplingParams
from adalink.runtime.errors import RequestError
from adalink.runtime.generation.speculative_decoding import PromptLookup
from adalink.runtime.sampling import logits_processors
from adalink.runtime.sampling.logits_processors import RowLimits, make_processors

VOCAB, BEGIN, STEPS = 24, 6, 9

SETTINGS: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.5},
    "presence reward": {"presence_penalty": -2},
    "frequency": {"frequency_penalty": 0.75},
    "frequency reward": {"frequency_penalty": -0.5},
    "bias": {"logit_bias": {3: 2.5, 7: -100, 23: 0.25}},
    "together": {"presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {3: 2.5, 5: -1.5}},
    "with a repetition penalty": {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {3: 2.5, 5: -1.5},
        "repetition_penalty": 1.7,
    },
    "with a ban": {"presence_penalty": -2, "logit_bias": {3: 100}, "bad_words_ids": [[3]]},
}


def expected_scores(
    logits: np.ndarray,
    prompt: list[int],
    made: list[int],
    *,
    presence_penalty: float = 0,
    frequency_penalty: float = 0,
    logit_bias: dict[int, float] | None = None,
    repetition_penalty: float = 1,
    bad_words_ids: list[list[int]] | None = None,
) -> np.ndarray:
    """The penalised logits of one position."""
    scores = logits.astype(np.float64)
    for token in range(len(scores)):
        scores[token] += (logit_bias or {}).get(token, 0)
        if token in prompt or token in made:
            scores[token] = (
                scores[token] / repetition_penalty if scores[token] > 0 else scores[token] * repetition_penalty
            )
        count = made.count(token)
        scores[token] -= frequency_penalty * count
        scores[token] -= presence_penalty * (count > 0)
        if [token] in (bad_words_ids or []):
            scores[token] = -np.inf
    return scores


def largest_difference(settings: dict[str, Any], seed: int) -> float:
    """Of the scores of some steps; infinite where one side bans a token and the other does not."""
    rng = np.random.default_rng(seed)
    prompt, made = rng.integers(1, 6, BEGIN).tolist(), list[int]()
    processors = make_processors(SamplingParams(temperature=0, **settings), RowLimits((2,), BEGIN, STEPS))
    worst = 0.0
    for _ in range(STEPS):
        logits = rng.normal(scale=4, size=VOCAB).astype(np.float32)
        scores = logits.copy()
        for process in processors:
            process(scores, [*prompt, *made])
        expected = expected_scores(logits, prompt, made, **settings)
        same = scores == expected
        worst = max(worst, float(np.abs(scores[~same] - expected[~same]).max(initial=0)))
        made.append(int(rng.integers(3, 8)))
    return worst


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_openais(name: str) -> None:
    assert max(largest_difference(SETTINGS[name], seed) for seed in range(8)) < 1e-5


class _PromptCounts(logits_processors.OccurrencePenaltyProcessor):
    def __post_init__(self) -> None:
        self._read = 0


class _LastTokenIsMissed(logits_processors.OccurrencePenaltyProcessor):
    def __call__(self, scores: Any, sequence: Any) -> None:
        super().__call__(scores, sequence[:-1])


class _EachCountsOnce(logits_processors.OccurrencePenaltyProcessor):
    def __call__(self, scores: Any, sequence: Any) -> None:
        self.begin, self.presence, self.frequency = 0, self.presence + self.frequency, 0
        super().__call__(scores, sequence)


class _PresenceCounts(logits_processors.OccurrencePenaltyProcessor):
    def __call__(self, scores: Any, sequence: Any) -> None:
        self.presence, self.frequency = 0, self.presence + self.frequency
        super().__call__(scores, sequence)


class _BiasIsSet(logits_processors.LogitBiasProcessor):
    def __call__(self, scores: Any, sequence: Any) -> None:
        scores[self._tokens] = self._numbers


FAULTS: dict[str, tuple[str, Any, str]] = {
    "the prompt counts": ("OccurrencePenaltyProcessor", _PromptCounts, "presence"),
    "the last token does not count": ("OccurrencePenaltyProcessor", _LastTokenIsMissed, "frequency"),
    "occurrences do not count": ("OccurrencePenaltyProcessor", _EachCountsOnce, "frequency"),
    "presence is taken each time": ("OccurrencePenaltyProcessor", _PresenceCounts, "presence reward"),
    "a bias replaces the logit": ("LogitBiasProcessor", _BiasIsSet, "bias"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_would_show(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    name, planted, setting = FAULTS[fault]
    monkeypatch.setattr(logits_processors, name, planted)
    assert max(largest_difference(SETTINGS[setting], seed) for seed in range(4)) > 0.1


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1)])
def test_another_order_would_show(monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]) -> None:
    original = logits_processors.make_processors
    monkeypatch.setitem(globals(), "make_processors", lambda *given: [original(*given)[index] for index in order])
    assert max(largest_difference(SETTINGS["with a repetition penalty"], seed) for seed in range(4)) > 0.1


def encode(text: str) -> list[int]:
    return [CHARACTERS.index(character) + 4 for character in text]


def expected_text(llama: Any, prompt: str, task: str | None, steps: int, settings: dict[str, Any]) -> list[int]:
    """Greedy tokens of PyTorch's logits under the formulas above, without a cache."""
    ids, made = encode(prompt), list[int]()
    while len(made) < steps:
        logits = llama.logits([*ids, *made], task)[-1]
        token = int(expected_scores(logits, ids, made, **settings).argmax())
        if token == 2:
            break
        made.append(token)
    return made


TEXTS: list[dict[str, Any]] = [
    {"frequency_penalty": 2.0},
    {"presence_penalty": -0.5, "frequency_penalty": 0.25},
    {"logit_bias": {20: 1.5, 33: -2.0}, "presence_penalty": 1.0},
]


@pytest.fixture
def opened(llama: Any) -> Iterator[Deployment]:
    with Deployment.open(llama.folder, threads=1) as deployment:
        yield deployment


def test_texts_alone_drafted_and_in_a_batch(llama: Any, opened: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [("wheat wheat wheat", task, settings) for task in (None, "alpha") for settings in TEXTS]
    expected = [expected_text(llama, *case[:2], 20, case[2]) for case in cases]
    plain = {task: llama.greedy(encode(cases[0][0]), task, 20) for task in (None, "alpha")}
    assert all(tokens != plain[task] for tokens, (_, task, _) in zip(expected, cases, strict=True))
    requests = [
        Request(prompt, task=task, max_new_tokens=20, sampling=SamplingParams(**settings), draft_tokens=drafts)
        for prompt, task, settings in cases
        for drafts in (0, 8)
    ]
    twice = [tokens for tokens in expected for _ in range(2)]
    together = [opened.submit(request) for request in requests]
    assert [list(handle.result(60).token_ids) for handle in together] == twice
    drafted: list[int] = []
    draft = PromptLookup.draft
    monkeypatch.setattr(PromptLookup, "draft", lambda *given: (made := draft(*given), drafted.append(len(made)))[0])
    assert [list(opened.submit(request).result(60).token_ids) for request in requests] == twice
    assert sum(drafted) > 0


def test_min_new_tokens_keeps_stop_tokens_back(opened: Deployment) -> None:
    """The base's end token and the request's alike."""
    whole = opened.generate(["wheat"], max_new_tokens=16, sampling=SamplingParams(suppress_tokens=[2]))[0].token_ids
    stop = whole[1]
    request = Request("wheat", max_new_tokens=16, stop_token_ids=[stop])
    assert opened.submit(request).result(60).token_ids == whole[: whole.index(stop)]
    late = Request("wheat", max_new_tokens=16, stop_token_ids=[stop], sampling=SamplingParams(min_new_tokens=7))
    for drafts in (0, 8):
        tokens = opened.submit(Request(**{**vars(late), "draft_tokens": drafts})).result(60).token_ids
        assert len(tokens) >= 7
        assert not {stop, 2} & set(tokens)


@pytest.mark.parametrize(
    ("settings", "wording"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1, expected a number from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"frequency_penalty": True}, "frequency_penalty is True"),
        ({"presence_penalty": "1"}, "presence_penalty is '1'"),
        ({"logit_bias": [3]}, r"logit_bias is \[3\], expected a mapping"),
        ({"logit_bias": {"3": 1}}, "logit_bias, a token id, is '3'"),
        ({"logit_bias": {-1: 1}}, "logit_bias, a token id, is -1"),
        ({"logit_bias": {3: 101}}, "logit_bias of token 3 is 101, expected a number from -100 to 100"),
        ({"logit_bias": {3: None}}, "logit_bias of token 3 is None"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], wording: str) -> None:
    with pytest.raises(RequestError, match=wording):
        SamplingParams(**settings)


def test_biases_are_of_the_vocabulary(opened: Deployment) -> None:
    with pytest.raises(RequestError, match="logit_bias holds 96, expected token ids from 0 to 95"):
        opened.submit(Request("wheat", sampling=SamplingParams(logit_bias={5: 1, 96: 1})))
