"""Generation defaults: a deployment answers as ``generate`` of transformers does with the same generation config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
import torch
from helpers.runtime import reseal
from helpers.tiny_models import DECODERS, FAMILIES, VOCAB_SIZE
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.base.export import export_base
from adalink.export.base.generation import describe_generation
from adalink.runtime import Deployment, SamplingParams
from adalink.runtime.errors import RequestError
from adalink.runtime.generation import token_chooser
from adalink.runtime.sampling import logits_processors
from adalink.runtime.storage.manifest_io import read_manifest

STEPS = 12
LENGTHS = (1, 4, 7, 12)
# Every way in which a config changes greedy tokens; transformers' own names.
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalty": {"repetition_penalty": 1.3, "temperature": 0.6, "top_p": 0.9},
    "ngrams": {"no_repeat_ngram_size": 2, "min_new_tokens": 6, "eos_token_id": [2, 30, 41, 52, 63, 74, 85]},
    "bans": {
        "suppress_tokens": list(range(4, 94, 5)),
        "begin_suppress_tokens": [33, 60],
        "eos_token_id": [2, 35, 55, 80],
    },
    "everything": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "sequence_bias": [[[12], 2.0], [[40, 41], 5.0]],
        "bad_words_ids": [[25], [30], [50], [77, 78]],
        "suppress_tokens": [31],
        "min_new_tokens": 3,
        "forced_eos_token_id": 2,
        "eos_token_id": [2, 17, 66],
        "max_new_tokens": 9,
    },
}
ENCODER_DECODER: dict[str, dict[str, Any]] = {
    "first token": {"forced_bos_token_id": 44, "begin_suppress_tokens": [10], "min_length": 7, "eos_token_id": [2, 9]},
    "length": {"max_length": 8, "forced_eos_token_id": 2, "repetition_penalty": 1.2},
}


def prompts(count: int = 20) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(4, VOCAB_SIZE, LENGTHS[index % len(LENGTHS)]).tolist() for index in range(count)]


def configure(model: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(model.generation_config, name, value)


def expected_rows(model: Any, rows: list[list[int]], **settings: Any) -> list[list[int]]:
    """What ``generate`` of transformers answers, without end tokens; rows of one length in a batch, without padding."""
    answers: dict[int, list[int]] = {}
    for length in {len(row) for row in rows}:
        members = [index for index, row in enumerate(rows) if len(row) == length]
        ids = torch.tensor([rows[index] for index in members])
        mask = torch.ones_like(ids)
        output = model.generate(input_ids=ids, attention_mask=mask, **{"do_sample": False} | settings)
        ends = np.atleast_1d(model.generation_config.eos_token_id)
        for index, row in zip(members, output[:, 1 if model.config.is_encoder_decoder else length :], strict=True):
            made = row.tolist()
            answers[index] = next((made[:at] for at, token in enumerate(made) if token in ends), made)
    return [answers[index] for index in range(len(rows))]


def expected_tokens(model: Any, prompt: list[int], **settings: Any) -> list[int]:
    return expected_rows(model, [prompt], **settings)[0]


class Served:
    """A family's deployment and its PyTorch model; the generation config changes without another export."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        export_base(FAMILIES[family](), folder, tokenizer=make_tokenizer())
        self.folder = folder

    def open(self, settings: dict[str, Any]) -> tuple[Any, Deployment]:
        """PyTorch's model and the deployment, both with these settings."""
        model: Any = FAMILIES[self.family]()
        configure(model, settings)
        base = read_manifest(self.folder).base
        ends = tuple(np.atleast_1d(model.generation_config.eos_token_id).tolist())
        generation = describe_generation(model, base.kind, base.vocab_size)
        reseal(self.folder, base=msgspec.structs.replace(base, generation=generation, eos_token_ids=ends))
        return model, Deployment.open(self.folder, threads=1)


@pytest.fixture(scope="module", params=[*DECODERS, "t5"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(request.param, tmp_path_factory.mktemp(request.param) / "deployment")


@pytest.fixture(scope="module")
def llama_served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served("llama", tmp_path_factory.mktemp("llama_served") / "deployment")


def test_greedy_equals_generate_of_transformers(served: Served) -> None:
    """Twenty prompts, in one batch and each alone, where drafts are verified."""
    configs = CONFIGS | (ENCODER_DECODER if served.family == "t5" else {})
    answers = set()
    for name, settings in configs.items():
        model, deployment = served.open(settings)
        limit = None if {"max_new_tokens", "max_length"} & settings.keys() else STEPS
        steps = {} if limit is None else {"max_new_tokens": limit}
        expected = expected_rows(model, prompts(), **steps)
        with deployment:
            together = deployment.generate(prompts(), max_new_tokens=limit)
            assert [list(row.token_ids) for row in together] == expected, name
            for prompt, tokens in list(zip(prompts(), expected, strict=True))[::3]:
                (alone,) = deployment.generate([prompt], max_new_tokens=limit)
                assert list(alone.token_ids) == tokens, name
        answers.add(str(expected))
    # Gemma's likeliest token is so by far: a penalty of 1.3 may change nothing.
    assert len(answers) >= len(configs) - 1, "configs change tokens"


def test_each_end_ends_a_row(llama_served: Served) -> None:
    settings = {"eos_token_id": [2, 30, 41, 52, 63, 74, 85]}
    model, deployment = llama_served.open(settings)
    with deployment:
        results = deployment.generate(prompts(), max_new_tokens=40)
        ended = [row for row in results if row.finish_reason == "stop"]
    configure(model, {"eos_token_id": 2})
    longer = expected_rows(model, prompts(), max_new_tokens=40)
    ends = {[*whole, 2][len(row.token_ids)] for whole, row in zip(longer, results, strict=True) if row in ended}
    assert len(ends) > 2


@pytest.mark.parametrize("draft_tokens", [0, 8])
def test_drafts_change_nothing(llama_served: Served, draft_tokens: int) -> None:
    """Repetitive prompts: drafts are plenty, and a penalty makes many of them wrong."""
    model, deployment = llama_served.open({"repetition_penalty": 1.2, "no_repeat_ngram_size": 4, "min_new_tokens": 20})
    with deployment:
        for prompt in ([11, 12, 13] * 4, [40] * 9, [50, 51] * 6):
            (row,) = deployment.generate([prompt], max_new_tokens=30, draft_tokens=draft_tokens)
            assert list(row.token_ids) == expected_tokens(model, prompt, max_new_tokens=30)


class TestSampling:
    """A config that samples: a plain call samples, from the distribution that transformers draws from."""

    SETTINGS: ClassVar[dict[str, Any]] = {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
    }

    def test_plain_call_samples_as_transformers(self, llama_served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        model, deployment = llama_served.open(self.SETTINGS)
        seen: list[np.ndarray] = []
        distribution = SamplingParams.distribution

        def note(self: SamplingParams, logits: np.ndarray) -> Any:
            seen.append(distribution(self, logits))
            return seen[-1]

        monkeypatch.setattr(SamplingParams, "distribution", note)
        prompt = prompts()[3]
        with deployment:
            (row,) = deployment.generate([prompt], sampling=SamplingParams(seed=1), max_new_tokens=10, draft_tokens=0)
        tokens = list(row.token_ids)
        assert len(seen) >= 5
        for step in range(len(seen)):
            ids = torch.tensor([[*prompt, *tokens[:step]]])
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=1,
                output_scores=True,
                return_dict_in_generate=True,
            )
            expected = output.scores[0][0].double().softmax(0).numpy()
            np.testing.assert_allclose(seen[step], expected, atol=2e-4)
            assert np.count_nonzero(expected) <= 50, "top_k is 50 where a config does not name it"

    def test_requests_override(self, llama_served: Served) -> None:
        model, deployment = llama_served.open(self.SETTINGS)
        prompt = prompts()[3]
        with deployment:
            (greedy,) = deployment.generate([prompt], sampling=SamplingParams(temperature=0), max_new_tokens=STEPS)
            (plain,) = deployment.generate(
                [prompt], sampling=SamplingParams(temperature=0, base_defaults=False), max_new_tokens=STEPS
            )
            (off,) = deployment.generate(
                [prompt], sampling=SamplingParams(temperature=0, repetition_penalty=1), max_new_tokens=STEPS
            )
        assert list(greedy.token_ids) == expected_tokens(model, prompt, max_new_tokens=STEPS)
        without = expected_tokens(model, prompt, max_new_tokens=STEPS, repetition_penalty=1.0)
        assert list(plain.token_ids) == list(off.token_ids) == without != list(greedy.token_ids)


def test_limit_of_the_base_is_the_default(llama_served: Served) -> None:
    """As far as the model has positions; a request's own limit is not shortened."""
    for settings, expected in (({}, 57), ({"max_new_tokens": 5}, 5), ({"max_new_tokens": 1000}, 57)):
        _, deployment = llama_served.open({**settings, "eos_token_id": 3})
        with deployment:
            (row,) = deployment.generate([[11] * 7])
            assert len(row.token_ids) == expected
            with pytest.raises(RequestError, match="65 positions"):
                deployment.generate([[11] * 7], max_new_tokens=58)


def test_deployments_without_defaults_take_the_likeliest(llama_served: Served) -> None:
    """Manifests of older kits have none."""
    model, _ = llama_served.open({"repetition_penalty": 1.5})
    base = read_manifest(llama_served.folder).base
    reseal(llama_served.folder, base=msgspec.structs.replace(base, generation=None))
    with Deployment.open(llama_served.folder) as deployment:
        (row,) = deployment.generate([prompts()[0]], max_new_tokens=STEPS)
    expected = expected_tokens(model, prompts()[0], max_new_tokens=STEPS, repetition_penalty=1.0)
    assert list(row.token_ids) == expected


def test_ban_of_every_token_is_named(llama_served: Served) -> None:
    _, deployment = llama_served.open({})
    with deployment:
        for temperature in (0, 1):
            sampling = SamplingParams(temperature=temperature, suppress_tokens=tuple(range(VOCAB_SIZE)))
            with pytest.raises(RequestError, match=r"row 0 \(base model\): .* ban every token for new token 1"):
                deployment.generate([[5, 6]], sampling=sampling)


@pytest.mark.parametrize(
    ("settings", "wording"),
    [
        ({"suppress_tokens": (96,)}, "suppress_tokens holds 96, expected token ids from 0 to 95"),
        ({"bad_words_ids": [[5], [200, 6]]}, "bad_words_ids holds 200"),
        ({"sequence_bias": [((96,), 1.0)]}, "sequence_bias holds 96"),
        ({"forced_bos_token_id": 96}, "forced_bos_token_id holds 96"),
    ],
)
def test_ids_beyond_the_vocabulary_are_named(llama_served: Served, settings: dict[str, Any], wording: str) -> None:
    _, deployment = llama_served.open({})
    with deployment, pytest.raises(RequestError, match=wording):
        deployment.generate([[5, 6]], sampling=SamplingParams(**settings))


FAULTS = {
    "no processors": lambda patch: patch.setattr(token_chooser, "make_processors", lambda *given: []),
    "the prompt is not in the sequence": lambda patch: patch.setattr(
        token_chooser,
        "make_processors",
        lambda params, limits: [
            (lambda scores, sequence, process=process: process(scores, sequence[limits.begin :]))
            for process in logits_processors.make_processors(params, limits)
        ],
    ),
    "chosen tokens are forgotten": lambda patch: patch.setattr(
        token_chooser.TokenChooser,
        "__init__",
        lambda self, params, processors, sequence, *rest, original=token_chooser.TokenChooser.__init__: original(
            self, params, [lambda scores, seen: [process(scores, sequence[:5]) for process in processors]], [], *rest
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_would_show(llama_served: Served, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    model, deployment = llama_served.open({"repetition_penalty": 1.3})
    expected = expected_rows(model, prompts(), max_new_tokens=STEPS)
    FAULTS[fault](monkeypatch)
    with deployment:
        found = [list(row.token_ids) for row in deployment.generate(prompts(), max_new_tokens=STEPS)]
    assert found != expected
