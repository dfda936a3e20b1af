"""Logits processors against those of transformers, on random logits and sequences: the scores are the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from adalink.runtime.sampling import logits_processors
from adalink.runtime.sampling.logits_processors import RowLimits, make_processors
from adalink.runtime.sampling.sampler import SamplingParams

VOCAB, ENDS, MAX_NEW = 24, (2, 7), 9

# Settings of a request, by name; `forced_eos_token_ids` is transformers' `forced_eos_token_id`.
SETTINGS: dict[str, dict[str, Any]] = {
    "sequence bias": {"sequence_bias": [((5,), 2.5), ((4, 5), -3.0), ((3, 5), 1.25), ((3, 3, 1), 7.0)]},
    "repetition penalty": {"repetition_penalty": 1.3},
    "repetition reward": {"repetition_penalty": 0.7},
    "no repeated token": {"no_repeat_ngram_size": 1},
    "no repeated pair": {"no_repeat_ngram_size": 2},
    "no repeated triple": {"no_repeat_ngram_size": 3},
    "bad words": {"bad_words_ids": [[5], [3, 4], [3, 3, 1], [2]]},
    "min length": {"min_length": 8},
    "min new tokens": {"min_new_tokens": 4},
    "forced first token": {"forced_bos_token_id": 6},
    "forced end": {"forced_eos_token_ids": (7, 2)},
    "suppressed tokens": {"suppress_tokens": (1, 4)},
    "suppressed first tokens": {"begin_suppress_tokens": (2, 5)},
    "suppressed after a forced token": {"begin_suppress_tokens": (2, 5), "forced_bos_token_id": 6},
    "all together": {
        "sequence_bias": [((5,), 2.5), ((3, 5), 1.25)],
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5], [3, 4]],
        "min_new_tokens": 4,
        "forced_eos_token_ids": (2,),
        "suppress_tokens": (1,),
        "begin_suppress_tokens": (8,),
    },
}


@pytest.fixture(scope="module")
def model() -> Any:
    """Any model: only its way from settings to processors is asked for."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1, n_positions=64))


def expected_processors(model: Any, settings: dict[str, Any], begin: int) -> Any:
    """The processors that ``generate`` of transformers makes for one unpadded row."""
    values = dict(settings)
    if "forced_eos_token_ids" in values:
        values["forced_eos_token_id"] = list(values.pop("forced_eos_token_ids"))
    if "sequence_bias" in values:
        values["sequence_bias"] = [[list(ids), bias] for ids, bias in values["sequence_bias"]]
    config = GenerationConfig(eos_token_id=list(ENDS), max_length=begin + MAX_NEW, **values)
    config._eos_token_tensor = torch.tensor(ENDS)
    mask = torch.ones(1, begin, dtype=torch.long)
    return model._get_logits_processor(config, begin, model_kwargs={"attention_mask": mask})


def largest_difference(model: Any, settings: dict[str, Any], seed: int, begin: int) -> float:
    """Of the scores of ``MAX_NEW`` steps; infinite where one side bans a token and the other does not."""
    rng = np.random.default_rng(seed)
    sequence = rng.integers(1, 6, begin).tolist()
    ours = make_processors(SamplingParams(temperature=0, **settings), RowLimits(ENDS, begin, MAX_NEW))
    theirs = expected_processors(model, settings, begin)
    worst = 0.0
    for _ in range(MAX_NEW):
        logits = rng.normal(scale=4, size=VOCAB).astype(np.float32)
        scores = logits.copy()
        for process in ours:
            process(scores, sequence)
        expected = theirs(torch.tensor([sequence]), torch.tensor(logits)[None])[0].numpy()
        same = scores == expected
        worst = max(worst, float(np.abs(scores[~same] - expected[~same]).max(initial=0)))
        sequence.append(int(rng.integers(1, 6)))
    return worst


@pytest.mark.parametrize("begin", [1, 2, 6, 12])
@pytest.mark.parametrize("name", SETTINGS)
def test_scores_equal_transformers(model: Any, name: str, begin: int) -> None:
    differences = [largest_difference(model, SETTINGS[name], seed, begin) for seed in range(4)]
    # All but the sequence biases are one operation in float32; sums of biases may be taken in another order.
    assert max(differences) <= (1e-6 if "sequence_bias" in SETTINGS[name] else 0)


class _PromptIgnored(logits_processors.RepetitionPenaltyProcessor):
    def __call__(self, scores: Any, sequence: Any) -> None:
        super().__call__(scores, sequence[6:])


class _OnlyDivides(logits_processors.RepetitionPenaltyProcessor):
    def __call__(self, scores: Any, sequence: Any) -> None:
        scores[list(set(sequence))] /= np.float32(self.penalty)


class _OnceForEach(logits_processors.RepetitionPenaltyProcessor):
    def __call__(self, scores: Any, sequence: Any) -> None:
        for token in sequence:
            super().__call__(scores, [token])
            self._seen.clear()
            self._read = 0


class _LongerNgram(logits_processors.NoRepeatNgramProcessor):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.size += 1


class _OneLastToken(logits_processors.SequenceBiasProcessor):
    def __call__(self, scores: Any, sequence: Any) -> None:
        super().__call__(scores, sequence[-1:])


class _SmallestEndOnly(logits_processors.MinLengthProcessor):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.end_ids = self.end_ids[:1]


class _OneLater(logits_processors.MinLengthProcessor):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.length += 1


class _ForcedLater(logits_processors.ForcedTokenProcessor):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.length += 1


class _AlwaysSuppressed(logits_processors.SuppressTokensProcessor):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.length = None


FAULTS: dict[str, tuple[str, Any, str]] = {
    "the prompt is not penalised": ("RepetitionPenaltyProcessor", _PromptIgnored, "repetition penalty"),
    "negative logits are divided too": ("RepetitionPenaltyProcessor", _OnlyDivides, "repetition penalty"),
    "a token is penalised each time": ("RepetitionPenaltyProcessor", _OnceForEach, "repetition penalty"),
    "n-grams are one longer": ("NoRepeatNgramProcessor", _LongerNgram, "no repeated pair"),
    "only pairs are bad words": ("SequenceBiasProcessor", _OneLastToken, "bad words"),
    "only one end is kept back": ("MinLengthProcessor", _SmallestEndOnly, "min new tokens"),
    "the end comes one token late": ("MinLengthProcessor", _OneLater, "min length"),
    "a token is forced one later": ("ForcedTokenProcessor", _ForcedLater, "forced end"),
    "a first token is suppressed always": ("SuppressTokensProcessor", _AlwaysSuppressed, "suppressed first tokens"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_would_show(model: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    name, planted, setting = FAULTS[fault]
    monkeypatch.setattr(logits_processors, name, planted)
    worst = max(largest_difference(model, SETTINGS[setting], seed, begin) for seed in range(4) for begin in (1, 6, 12))
    assert worst > 1e-3


def test_another_order_would_show(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty before a bias, and a ban before a forced token, give other numbers."""
    original = logits_processors.make_processors
    monkeypatch.setitem(globals(), "make_processors", lambda *given: original(*given)[::-1])
    settings = {"sequence_bias": [((5,), 2.5)], "repetition_penalty": 1.7}
    assert max(largest_difference(model, settings, seed, 6) for seed in range(4)) > 1e-3
    settings = {"suppress_tokens": (2,), "forced_eos_token_ids": (2, 7)}
    assert max(largest_difference(model, settings, seed, 6) for seed in range(4)) == np.inf


SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "together": {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
    "hot": {"temperature": 2.0, "top_k": 20, "top_p": 0.95, "min_p": 0.02, "no_repeat_ngram_size": 2},
}


def sampled_difference(model: Any, settings: dict[str, Any], seed: int) -> float:
    """Largest difference of a probability between ours and transformers', which it draws from."""
    rng = np.random.default_rng(seed)
    sequence = rng.integers(1, 6, 6).tolist()
    logits = rng.normal(scale=2, size=VOCAB).astype(np.float32)
    params, scores = SamplingParams(**settings), logits.copy()
    for process in make_processors(params, RowLimits(ENDS, 6, MAX_NEW)):
        process(scores, sequence)
    theirs = expected_processors(model, settings | {"do_sample": True}, 6)
    expected = theirs(torch.tensor([sequence]), torch.tensor(logits)[None])[0].double().softmax(0).numpy()
    return float(np.abs(params.distribution(scores) - expected).max())


@pytest.mark.parametrize("name", SAMPLED)
def test_probabilities_equal_transformers(model: Any, name: str) -> None:
    assert max(sampled_difference(model, SAMPLED[name], seed) for seed in range(20)) < 1e-6


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("temperature", {"temperature": 0.61}),
        ("top_k", {"top_k": 6}),
        ("top_p", {"top_p": 0.83}),
        ("min_p", {"min_p": 0.12}),
        ("together", {"min_p": None}),
        ("together", {"repetition_penalty": None}),
    ],
)
def test_other_settings_would_show(
    model: Any, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any]
) -> None:
    original = SamplingParams
    monkeypatch.setitem(globals(), "SamplingParams", lambda **settings: original(**settings | changes))
    assert max(sampled_difference(model, SAMPLED[name], seed) for seed in range(20)) > 1e-3
