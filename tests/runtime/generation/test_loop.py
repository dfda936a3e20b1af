"""Generation against PyTorch run anew at every step, without a cache and without padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import CHARACTERS, make_tokenizer

from adalink.export.base.export import export_base
from adalink.runtime import Deployment
from adalink.runtime.errors import RequestError
from adalink.runtime.generation.padding import pad, positions_of
from adalink.runtime.model_runner import ModelRunner
from adalink.runtime.ort.static_cache import StaticCacheDecodeState
from adalink.runtime.sampling.sampler import SamplingParams
from adalink.runtime.storage.adapter import make_adapter

PROMPTS = ["A bank raised", "wheat", "Q", "crude oil, 1987"]


def encode(text: str) -> list[int]:
    return [CHARACTERS.index(character) + 4 for character in text]


@pytest.mark.parametrize("task", [None, "alpha", "beta", "prompted"])
@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_greedy_equals_pytorch(llama: Any, deployment: Deployment, task: str | None, prompt: str) -> None:
    result = deployment.generate([prompt], tasks=task, max_new_tokens=20)[0]
    assert list(result.token_ids) == llama.greedy(encode(prompt), task, 20)
    assert result.prompt_tokens == len(prompt)
    assert result.finish_reason == ("length" if len(result.token_ids) == 20 else "stop")


def test_scope_decides_about_generated_tokens(llama: Any, deployment: Deployment) -> None:
    """Were generated tokens adapted under scope "prompt" too, other tokens would follow: the two differ here."""
    prompted = llama.adapters["prompted"]
    everywhere = make_adapter(msgspec.structs.replace(prompted.config, scope="all"), prompted.weights)
    other = replace(llama, adapters={"prompted": everywhere})
    differing = [
        prompt
        for prompt in PROMPTS
        if other.greedy(encode(prompt), "prompted", 20) != llama.greedy(encode(prompt), "prompted", 20)
    ]
    assert differing
    for prompt in differing:
        result = deployment.generate([prompt], tasks="prompted", max_new_tokens=20)[0]
        assert list(result.token_ids) == llama.greedy(encode(prompt), "prompted", 20)


def test_a_mixed_batch_equals_each_prompt_alone(deployment: Deployment) -> None:
    tasks = ["alpha", None, "prompted", "beta"]
    together = deployment.generate(PROMPTS, tasks=tasks, max_new_tokens=24)
    alone = [
        deployment.generate([prompt], tasks=task, max_new_tokens=24)[0]
        for prompt, task in zip(PROMPTS, tasks, strict=True)
    ]
    assert together == alone
    assert len({result.token_ids for result in together}) == 4


def test_rows_that_end_leave_the_batch(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows stop at different steps, in every order; each is as if it were alone, and steps get smaller."""
    sizes: list[int] = []
    step = StaticCacheDecodeState.step

    def note(self: StaticCacheDecodeState, inputs_embeds: Any) -> None:
        sizes.append(len(inputs_embeds))
        step(self, inputs_embeds)

    monkeypatch.setattr(StaticCacheDecodeState, "step", note)
    prompts, tasks = [*PROMPTS, *PROMPTS[::-1]], ["alpha", None, "prompted", "beta", "beta", "alpha", None, "double"]
    tasks = [task if task in deployment.tasks else None for task in tasks]
    whole = deployment.generate(prompts, tasks=tasks, max_new_tokens=24)
    stops = [result.text[2 + 4 * row :][:3] for row, result in enumerate(whole[:4]) if len(result.text) > 4 + 4 * row]
    alone = [
        deployment.generate([prompt], tasks=task, max_new_tokens=24, stop=stops)[0]
        for prompt, task in zip(prompts, tasks, strict=True)
    ]
    sizes.clear()
    assert deployment.generate(prompts, tasks=tasks, max_new_tokens=24, stop=stops) == alone
    lengths = {len(result.token_ids) for result in alone}
    assert len(lengths) > 2, "rows of several lengths"
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2, "the batch got smaller more than once"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("target", ["onnxruntime-cpu", "portable"])
def test_learned_positions_of_rows_that_go_and_change_places(tmp_path: Path, target: str, side: str) -> None:
    """They are an input of the graph, which rotary ones are not; every step against the whole row in PyTorch."""
    model, rng = FAMILIES["gpt2"](), np.random.default_rng(3)
    export_base(model, tmp_path / "deployment", target=target)
    rows = [rng.integers(4, 96, length).tolist() for length in (5, 1, 9, 3)]
    ids, mask = pad(rows, 0, "left")
    if side == "right":
        ids, mask = (
            np.array([np.roll(row, len(own)) for row, own in zip(given, rows, strict=True)]) for given in (ids, mask)
        )
    with Deployment.open(tmp_path / "deployment", threads=1) as opened:
        engine = opened._runner.engine
        decoding = engine.start({"inputs_embeds": opened.input_embeddings(ids), "attention_mask": mask}, 8)
        for dropped in (None, 0, None, 1, 1, None):
            with torch.no_grad():
                expected = [model(torch.tensor([row])).logits[0, -1].numpy() for row in rows]
            np.testing.assert_allclose(decoding.logits, expected, atol=2e-4)
            if dropped is not None:
                decoding.drop(dropped)
                rows[dropped] = rows[-1]
                rows.pop()
            tokens = rng.integers(4, 96, (len(rows), 1))
            rows = [[*row, int(token)] for row, token in zip(rows, tokens[:, 0], strict=True)]
            decoding.step(opened.input_embeddings(tokens))


def test_streamed_pieces_make_the_text(deployment: Deployment) -> None:
    pieces: dict[int, list[str]] = {0: [], 1: []}
    results = deployment.generate(
        PROMPTS[:2], tasks="alpha", max_new_tokens=16, stream=lambda row, piece: pieces[row].append(piece)
    )
    for row, result in enumerate(results):
        assert "".join(pieces[row]) == result.text
        assert result.text == make_tokenizer().decode(list(result.token_ids))
        assert len(pieces[row]) > 1 or len(result.token_ids) < 2


def test_stop_text_ends_the_row_and_is_never_streamed(deployment: Deployment) -> None:
    texts = {prompt: deployment.generate([prompt], max_new_tokens=20)[0].text for prompt in PROMPTS}
    prompt, whole, stop = next(
        (prompt, whole, whole[i : i + 3])
        for prompt, whole in texts.items()
        for i in range(4, len(whole) - 3)
        if whole.find(whole[i : i + 3]) == i
    )
    pieces: list[str] = []
    result = deployment.generate(
        [prompt], max_new_tokens=20, stop=[stop, "never-there"], stream=lambda row, piece: pieces.append(piece)
    )[0]
    assert result.finish_reason == "stop"
    assert result.text == whole[: whole.index(stop)] == "".join(pieces)
    assert len(result.token_ids) < 20


def test_sampling_repeats_with_its_seed(deployment: Deployment) -> None:
    def sample(seed: int) -> list[Any]:
        return deployment.generate(["wheat"] * 3, sampling=SamplingParams(2.0, top_k=40, seed=seed), max_new_tokens=12)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert len({result.token_ids for result in sample(1)}) == 3


@pytest.mark.parametrize(
    ("settings", "wording"),
    [
        ({"prompts": []}, "at least one text"),
        ({"prompts": "abc"}, "expected a list"),
        ({"prompts": [""]}, "prompt 0 has no tokens"),
        ({"prompts": ["abc"], "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompts": ["abc"], "draft_tokens": -1}, "draft_tokens is -1"),
        ({"prompts": ["abc"], "max_new_tokens": 62}, "65 positions.*at most 64"),
        ({"prompts": ["abc"], "stop": ["x", ""]}, "empty text"),
        ({"prompts": ["abc"], "tasks": ["alpha", None]}, "2 entries for 1 rows"),
        ({"prompts": None}, "prompts is None, expected a list"),
        ({"prompts": 5}, "prompts is 5, expected a list"),
        ({"prompts": np.array(5)}, "prompts is 5, expected a list"),
        ({"prompts": np.zeros((0, 3), np.int64)}, "at least one text"),
        ({"prompts": [5, 6, 7]}, r"prompt 0 is 5, expected .*: \[\[5, 6, 7\]\] is one prompt of three"),
        ({"prompts": np.array([5, 6, 7])}, "prompt 0 is 5, expected"),
        ({"prompts": ["abc", None]}, "prompt 1 is None, expected a text or a list of token ids"),
        ({"prompts": [[[5]]]}, r"prompt 0 is \[\[5\]\], expected"),
        ({"prompts": [[[5], [6, 7]]]}, "prompt 0 is not a rectangular array"),
        ({"prompts": [[None]]}, "prompt 0 has dtype object, expected whole numbers"),
        ({"prompts": ["abc"], "stop": 5}, "stop is 5, expected a text or a list of texts"),
        ({"prompts": ["abc"], "stop": [None]}, r"stop is \[None\], expected"),
        ({"prompts": ["abc"], "tasks": 5}, "tasks is 5, expected a name"),
        ({"prompts": ["abc"], "tasks": [["alpha"]]}, "tasks is .*, expected a name"),
        ({"prompts": ["abc"], "max_new_tokens": "4"}, "max_new_tokens is '4', expected a whole number"),
        ({"prompts": ["abc"], "max_new_tokens": 4.0}, "max_new_tokens is 4.0, expected a whole number"),
        ({"prompts": ["abc"], "draft_tokens": 2.0}, "draft_tokens is 2.0, expected a whole number"),
        ({"prompts": ["abc"], "sampling": {"temperature": "1"}}, "temperature is '1', expected a number"),
        ({"prompts": ["abc"], "sampling": {"temperature": 1.0, "top_k": 5.0}}, "top_k is 5.0, expected a whole number"),
        ({"prompts": ["abc"], "sampling": {"temperature": 1.0, "top_p": "0.9"}}, "top_p is '0.9', expected a number"),
        ({"prompts": ["abc"], "sampling": {"temperature": 1.0, "seed": 1.0}}, "seed is 1.0, expected a whole number"),
    ],
)
def test_bad_settings(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], wording: str
) -> None:
    monkeypatch.setattr(ModelRunner, "start", lambda *_: pytest.fail("the engine was asked"))
    settings = dict(settings)
    sampling = settings.pop("sampling", {})
    with pytest.raises(RequestError, match=wording):
        deployment.generate(**settings, sampling=SamplingParams(**sampling))


def test_settings_may_be_numbers_of_numpy(deployment: Deployment) -> None:
    settings: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "seed": 7}
    numpy_settings = {name: np.asarray(value)[()] for name, value in settings.items()}
    expected = deployment.generate(["wheat"], max_new_tokens=4, sampling=SamplingParams(**settings))
    found = deployment.generate(["wheat"], max_new_tokens=np.int64(4), sampling=SamplingParams(**numpy_settings))  # type: ignore[arg-type]
    assert found == expected


@pytest.mark.parametrize("chat", [False, True])
def test_half_a_character_is_refused(deployment: Deployment, chat: bool) -> None:
    with pytest.raises(RequestError, match=r"holds '\\ud800' at character 1"):
        deployment.generate(["a\ud800"], chat=chat)
    with pytest.raises(RequestError, match=r"holds '\\ud800' at character 1"):
        deployment.tokenizer.encode("a\ud800")


def test_positions_count_the_tokens_of_a_row() -> None:
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1]])
    np.testing.assert_array_equal(positions_of(mask), [[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 0, 1]])


def test_prompts_may_be_token_ids(llama: Any) -> None:
    with Deployment.open(llama.folder) as deployment:
        texts = ["oil prices", "wheat"]
        tokens = [deployment.tokenizer.encode(text) for text in texts]
        expected = deployment.generate(texts, tasks=["alpha", None], max_new_tokens=6)
        assert deployment.generate(tokens, tasks=["alpha", None], max_new_tokens=6) == expected
        assert deployment.generate([texts[0], np.array(tokens[1])], tasks=["alpha", None], max_new_tokens=6) == expected
        assert deployment.generate(np.array(tokens[1:]), max_new_tokens=6) == deployment.generate(
            texts[1:], max_new_tokens=6
        )
        for prompt, words in (([], "no tokens"), ([96], "prompt 0 holds 96, expected 0 to"), ([0.5], "whole numbers")):
            with pytest.raises(RequestError, match=words):
                deployment.generate([prompt], max_new_tokens=2)
        with pytest.raises(RequestError, match="chat is for texts"):
            deployment.generate([tokens[0]], chat=True)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_last_token_is_not_run(deployment: Deployment, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Nobody asks what would follow it: of ``n`` tokens the prompt gives one, and each pass another."""
    passes: list[int] = []
    step = StaticCacheDecodeState.step

    def count(self: StaticCacheDecodeState, embeds: np.ndarray) -> None:
        passes.append(len(embeds))
        step(self, embeds)

    monkeypatch.setattr(StaticCacheDecodeState, "step", count)
    made = deployment.generate(["oil", "wheat prices"], max_new_tokens=steps)
    assert [len(row.token_ids) for row in made] == [steps, steps]
    assert passes == [2] * (steps - 1)
