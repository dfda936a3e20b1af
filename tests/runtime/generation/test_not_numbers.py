"""Outputs that are not numbers: every path that reads logits or hidden states says so, with the row and its task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.adapter.export import export_adapter
from adalink.export.base import variant
from adalink.export.base.export import export_base
from adalink.runtime import Deployment, SamplingParams
from adalink.runtime.errors import BackendError, ModelError
from adalink.runtime.generation import token_chooser
from adalink.runtime.generation.token_chooser import TokenChooser
from adalink.runtime.ort.static_cache import StaticCacheDecodeState
from adalink.runtime.sampling.sampler import PLAIN_GREEDY
from adalink.runtime.storage.adapter import make_adapter
from adalink.runtime.storage.manifest_io import read_manifest

ROW = [5, 6, 7, 8]


def weight_of(model: Any) -> Any:
    """The first matrix of an MLP, which every family has."""
    wanted = ("mlp", "DenseReluDense", "intermediate")
    return next(p for name, p in model.named_parameters() if p.dim() > 1 and any(part in name for part in wanted))


def spoilt(family: str, how: str) -> Any:
    """A model whose weights hold a NaN, or are finite and overflow inside."""
    model = FAMILIES[family]()
    with torch.no_grad():
        if how == "nan":
            weight_of(model)[0, 0] = float("nan")
        else:
            weight_of(model).div_(weight_of(model).abs().max()).mul_({"overflow": 3e38, "norm": 1e20}[how])
    assert how == "nan" or all(p.isfinite().all() for p in model.parameters())
    return model


def broken(family: str, folder: Path, how: str) -> Deployment:
    """Its deployment, as an export without a look at the activations would write it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variant, "check_activations", lambda *given: None)
        export_base(spoilt(family, how), folder, tokenizer=make_tokenizer())
    return Deployment.open(folder, threads=1)


@pytest.mark.parametrize("how", ["nan", "overflow", "norm"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_export_refuses(tmp_path: Path, family: str, how: str) -> None:
    """A norm after an overflow leaves finite numbers, in PyTorch or in ONNX Runtime."""
    with pytest.raises(ModelError, match=r"does not compute numbers: .*\.\w+ gives"):
        export_base(spoilt(family, how), tmp_path / "deployment")


@pytest.mark.parametrize("how", ["logits", "states"])
def test_equal_outputs_say_nothing(tmp_path: Path, how: str) -> None:
    """What a norm leaves behind an overflow: zeros."""
    family = "llama" if how == "logits" else "t5"
    with broken(family, tmp_path / "deployment", "norm") as deployment:
        with pytest.raises(BackendError, match=r"(logits for new token 1|hidden states at position 0) are all 0"):
            deployment.generate([ROW], max_new_tokens=3)
        with pytest.raises(BackendError, match=rf"row 0 \(base model\): .*{how} at position 0 are all 0"):
            deployment.run(input_ids=[ROW])


@pytest.mark.parametrize("how", ["nan", "overflow"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generate_says_so(tmp_path: Path, family: str, how: str) -> None:
    expected = r"row 0.*: the engine's (logits for new token 1|hidden states at position \d) hold"
    with broken(family, tmp_path / "deployment", how) as deployment:
        for settings in ({}, {"sampling": SamplingParams(1.0)}, {"sampling": SamplingParams(repetition_penalty=1.2)}):
            for rows in ([ROW], [ROW, ROW[:2]]):
                with pytest.raises(BackendError, match=expected):
                    deployment.generate(rows, max_new_tokens=3, **settings)


@pytest.mark.parametrize(("family", "what"), [("llama", "logits"), ("bert", "hidden states"), ("t5", "hidden states")])
@pytest.mark.parametrize("how", ["nan", "overflow"])
def test_run_says_so(tmp_path: Path, family: str, what: str, how: str) -> None:
    expected = rf"row 0 \(base model\): the engine's {what} at position \d hold"
    with broken(family, tmp_path / "deployment", how) as deployment, pytest.raises(BackendError, match=expected):
        deployment.run(input_ids=[ROW])


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound base with a sound task, and one whose finite embeddings overflow in the first norm."""
    root = tmp_path_factory.mktemp("overflowing")
    export_base(FAMILIES["llama"](), root / "deployment", tokenizer=make_tokenizer())
    base = read_manifest(root / "deployment").base
    for seed, name in enumerate(("sound", "huge")):
        settings = {"rank": 4, "activation": "identity", "bias": False, "scope": "all"}
        adapter = random_adapter(base.fingerprint, base.hidden_size, seed, **settings)
        if name == "huge":
            weights = {key: weight * np.float32(1e15) for key, weight in adapter.weights.items()}
            adapter = make_adapter(adapter.config, weights)
        export_adapter(write_adapter(root / name, adapter), root / "deployment")
    return root / "deployment"


def test_row_and_task_are_named(overflowing: Path) -> None:
    """The others of the batch are sound."""
    tasks = ["sound", None, "huge", "sound"]
    with Deployment.open(overflowing) as deployment:
        expected = r"row 2 \(task 'huge'\): the engine's logits for new token 1 (hold|are all 0)"
        for sampling in (None, SamplingParams(1.0), SamplingParams(repetition_penalty=1.3)):
            with pytest.raises(BackendError, match=expected):
                deployment.generate([ROW] * 4, tasks=tasks, max_new_tokens=3, sampling=sampling)
        with pytest.raises(
            BackendError, match=r"row 2 \(task 'huge'\): the engine's logits at position 0 (hold|are all 0)"
        ):
            deployment.run(input_ids=[ROW] * 4, tasks=tasks)
        with pytest.raises(BackendError, match=r"row 0 \(task 'huge'\)"):
            deployment.generate([ROW], tasks="huge", max_new_tokens=3)
        assert deployment.generate([ROW] * 2, tasks=["sound", None], max_new_tokens=3)


def test_padding_may_hold_anything(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, mask = deployment._runner.engine, np.array([[1, 1, 0], [1, 1, 1]])
    run = type(engine).run

    def with_garbage(self: Any, feeds: Any) -> Any:
        output = run(self, feeds).copy()
        output[np.asarray(feeds["attention_mask"]) == 0] = np.nan
        return output

    monkeypatch.setattr(type(engine), "run", with_garbage)
    deployment.run(input_ids=[[5, 6, 0], [5, 6, 7]], attention_mask=mask)


def spoil(value: float, where: int | slice = 11) -> Callable[[np.ndarray], None]:
    def change(logits: np.ndarray) -> None:
        logits[..., where] = value

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_later_steps_are_checked(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, draft_tokens: int, value: float
) -> None:
    """Decode steps, and passes that verify draft tokens."""
    for name in ("step", "verify"):
        original = getattr(StaticCacheDecodeState, name)

        def spoiled(self: Any, embeds: Any, original: Any = original) -> Any:
            result = original(self, embeds)
            spoil(value)(self._logits if result is None else result)
            return result

        monkeypatch.setattr(StaticCacheDecodeState, name, spoiled)
    got = "NaN" if np.isnan(value) else "infinity"
    for sampling in (None, SamplingParams(0.9)):
        with pytest.raises(BackendError, match=f"logits for new token 2 hold {got}, expected numbers"):
            deployment.generate(["wheat wheat wheat"], max_new_tokens=6, sampling=sampling, draft_tokens=draft_tokens)


def chooser(params: SamplingParams) -> TokenChooser:
    resolved = params.resolve(None, 96)
    processors = token_chooser.make_processors(resolved, token_chooser.RowLimits((2,), 1, 5))
    return TokenChooser(resolved, processors, [5], np.random.default_rng(0), "row 3 (task 'topics')")


WAYS = {"greedy": PLAIN_GREEDY, "sampled": SamplingParams(1.0), "processed": SamplingParams(repetition_penalty=1.5)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [6, 7, 16, 33, 96, 1000])
def test_one_bad_logit_anywhere_is_found(way: str, dtype: Any, size: int) -> None:
    """Whatever the loop over so many numbers looks like inside numpy."""
    for place in {0, size // 2, size - 1}:
        for value in (np.nan, np.inf):
            logits = np.random.default_rng(1).normal(size=size).astype(dtype)
            logits[place] = value
            with pytest.raises(
                BackendError, match=r"row 3 \(task 'topics'\): the engine's logits for new token 1 hold"
            ):
                chooser(WAYS[way])(logits)


@pytest.mark.parametrize("way", WAYS)
def test_minus_infinity_is_a_number_unless_it_is_all(way: str) -> None:
    logits = np.full(96, -np.inf, np.float32)
    with pytest.raises(BackendError, match="hold minus infinity alone"):
        chooser(WAYS[way])(logits)
    logits[17] = -3.0
    assert chooser(WAYS[way])(logits) == 17


@pytest.mark.parametrize("way", WAYS)
def test_a_missing_check_would_show(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(TokenChooser, "_check", lambda self, best: None)
    logits = np.zeros(96, np.float32)
    logits[4] = np.nan
    if way == "sampled":
        with pytest.raises(ValueError, match="robabilities contain NaN"):
            chooser(WAYS[way])(logits)
    else:
        assert 0 <= chooser(WAYS[way])(logits) < 96  # a token without a word
