"""KV prefixes: what an engine gives behind them is what PyTorch gives with them as its initial cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.export import skip_windows_of_old
from helpers.host_device import HostBackend
from helpers.kv_prefixes import SETTINGS, TASKS, Prefixed, build_prefixed, prefix_adapter
from helpers.quick import slow_except
from helpers.runtime import write_adapter
from helpers.soft_prompts import padded
from helpers.vision_deployments import VisionDeployment, picture
from transformers import DynamicCache

from adalink.export.base.kv_cache import export_kv_cache
from adalink.runtime import Request, model_runner
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import BackendError, RequestError
from adalink.runtime.generation import admission
from adalink.runtime.generation.prefix_cache import PrefixCache, PrefixKey
from adalink.runtime.options import OpenOptions
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.tasks import registry

NEW = 8
PROFILE = Profile(batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 4, 5), past=ShapeRange(0, 8, 55))
VARIANTS = ("onnxruntime-cpu", "portable")


def rows(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(lengths)
    return [rng.integers(3, 96, length).tolist() for length in lengths]


FAMILIES = ["llama", "qwen2", "qwen3", "gemma3", "gpt2", "phi3"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Prefixed:
    return build_prefixed("llama", tmp_path_factory.mktemp("kv-prefix"))


@pytest.fixture(scope="module", params=slow_except(FAMILIES, "llama", "gemma3"))
def decoder(request: pytest.FixtureRequest, llama: Prefixed, tmp_path_factory: pytest.TempPathFactory) -> Prefixed:
    skip_windows_of_old(request.param)
    return llama if request.param == "llama" else build_prefixed(request.param, tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_alone_and_in_a_mixed_batch(decoder: Prefixed, variant: str) -> None:
    own = rows(7, 3, 10, 3, 6, 10, 4)
    expected = [decoder.output(ids, task) for ids, task in zip(own, TASKS, strict=True)]
    with Deployment.open(decoder.folder, variant=variant) as deployment:
        for ids, task, (output, limit) in zip(own, TASKS, expected, strict=True):
            received = deployment.run(input_ids=[ids], tasks=task)["logits"][0]
            assert np.abs(received - output).max() <= limit, task
            assert task is None or np.abs(output - decoder.output(ids, None)[0]).max() > 100 * limit, task
        for left in (True, False):
            ids, mask, places = padded(own, left=left)
            together = deployment.run(input_ids=ids, attention_mask=mask, tasks=TASKS)["logits"]
            for row, (place, (output, limit)) in enumerate(zip(places, expected, strict=True)):
                assert np.abs(together[row, place] - output).max() <= limit, TASKS[row]


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_alone_and_in_a_mixed_batch(decoder: Prefixed, variant: str) -> None:
    prompts = rows(7, 3, 9, 2, 5, 8, 4)
    expected = [decoder.greedy(prompt, task, NEW) for prompt, task in zip(prompts, TASKS, strict=True)]
    with Deployment.open(decoder.folder, variant=variant) as deployment:
        found = deployment.generate(prompts, tasks=TASKS, max_new_tokens=NEW)
        for prompt, row, wanted, task in zip(prompts, found, expected, TASKS, strict=True):
            assert list(row.token_ids) == wanted, task
            assert deployment.generate([prompt], tasks=task, max_new_tokens=NEW)[0] == row, task


def test_rows_that_join_a_running_batch(llama: Prefixed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are read in pieces, behind their KV prefixes, while others decode."""
    for name, value in {"STEP_TOKENS": 4, "IDLE_TOKENS": 8, "PASS_TOKENS": 4}.items():
        monkeypatch.setattr(admission, name, value)
    prompts = rows(9, 13, 6, 11, 5, 8, 12)
    with Deployment.open(llama.folder, slots=3) as deployment:
        handles = [
            deployment.submit(Request(prompt, task=task, max_new_tokens=NEW))
            for prompt, task in zip(prompts, TASKS, strict=True)
        ]
        for prompt, task, handle in zip(prompts, TASKS, handles, strict=True):
            assert list(handle.result(60).token_ids) == llama.greedy(prompt, task, NEW), task


@pytest.mark.parametrize("task", ["before", "all"])
def test_drafts_are_verified_behind_a_kv_prefix(llama: Prefixed, task: str) -> None:
    prompt = rows(6)[0] * 3
    with Deployment.open(llama.folder) as deployment:
        found = deployment.generate([prompt], tasks=task, max_new_tokens=16, draft_tokens=4)[0]
        assert found == deployment.generate([prompt], tasks=task, max_new_tokens=16, draft_tokens=0)[0]
    assert list(found.token_ids) == llama.greedy(prompt, task, 16)


def serve_alike(own: Prefixed, tasks: list[str | None]) -> list[list[int]]:
    """Tokens of one prompt under each task, with the prefix cache on; then of a prompt that begins alike."""
    (first, second) = rows(9, 5)
    found = []
    with Deployment.open(own.folder, prefix_cache_bytes=1 << 20) as deployment:
        for prompt in (first, [*first[:6], *second]):
            for task in tasks:
                answer = deployment.generate([prompt], tasks=task, max_new_tokens=NEW)[0]
                found.append(
                    [*answer.token_ids, *([-1] if list(answer.token_ids) != own.greedy(prompt, task, NEW) else [])]
                )
    return found


def test_the_prefix_cache_goes_on_behind_a_kv_prefix(llama: Prefixed, resumed: list[int]) -> None:
    assert all(-1 not in tokens for tokens in serve_alike(llama, TASKS))
    # What each row begins with: its KV prefix alone, then also six tokens of the prompt before, and a soft prompt.
    sizes = dict(zip(TASKS, [0, 0, 5, 5, 11, 3, 1], strict=True))
    soft = {"all": 2}
    assert resumed == [
        *(size for size in sizes.values() if size),
        *(size + soft.get(task or "", 0) + 6 for task, size in sizes.items()),
    ]


def test_a_key_without_the_kv_prefix_gives_another_tasks(llama: Prefixed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: the prefix cache does not tell what stands before a prompt."""
    monkeypatch.setattr(
        model_runner, "PrefixKey", lambda base, adapter, scope, kv_prefix="": PrefixKey(base, adapter, scope)
    )
    assert any(-1 in tokens for tokens in serve_alike(llama, ["before", "before-too"]))


def test_entries_of_the_prefix_cache_hold_no_kv_prefix(llama: Prefixed, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[tuple[int, int]] = []
    monkeypatch.setattr(
        PrefixCache, "add", lambda self, key, tokens, states: lengths.append((len(tokens), states.shape[2]))
    )
    with Deployment.open(llama.folder, prefix_cache_bytes=1 << 20) as deployment:
        deployment.generate(rows(7), tasks="long", max_new_tokens=3)
    assert lengths
    assert all(tokens == positions for tokens, positions in lengths)


@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_behind_a_kv_prefix(llama: Prefixed, variant: str) -> None:
    """Log-likelihoods of labels, from PyTorch's logits of prompt and label."""
    texts, labels = ["oil", "a bank"], [" up", " down", "a"]
    with Deployment.open(llama.folder, variant=variant) as deployment:
        found = deployment.classify(texts, "all", labels=labels)
        encode = deployment.tokenizer.encode_plain
        for text, answer in zip(texts, found, strict=True):
            scores = []
            for label in labels:
                tokens = [*deployment.tokenizer.encode(text), *encode(label), 2]
                start = len(tokens) - len(encode(label)) - 1
                logits = llama.run(llama.model, tokens, "all", len(tokens) - start)[0, -len(tokens) :].double()
                chosen = torch.log_softmax(logits, dim=1)[range(start - 1, len(tokens) - 1), tokens[start:]]
                scores.append(float(chosen.sum()))
            expected = np.exp(np.array(scores) - np.logaddexp.reduce(scores))
            received = [answer.probabilities[label.strip()] for label in labels]
            np.testing.assert_allclose(received, expected, rtol=1e-3, atol=1e-6)


def test_prefix_prompt_and_reply_share_the_positions(llama: Prefixed) -> None:
    (ids,) = rows(53)
    with Deployment.open(llama.folder) as deployment:
        deployment.run(input_ids=[ids], tasks="long")
        deployment.generate([ids[:-4]], tasks="long", max_new_tokens=4)
        for call in (
            lambda: deployment.run(input_ids=[[*ids, 5]], tasks="long"),
            lambda: deployment.generate([ids], tasks="long", max_new_tokens=1),
        ):
            with pytest.raises(RequestError, match="65 positions"):
                call()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_device_engine_refuses(llama: Prefixed, in_place: bool) -> None:
    host = HostBackend(PROFILE, in_place=in_place)
    with Deployment(llama.folder, read_manifest(llama.folder), host, OpenOptions("portable")) as deployment:
        for call in (
            lambda: deployment.run(input_ids=rows(4), tasks="before"),
            lambda: deployment.generate(rows(4), tasks=["all"], max_new_tokens=2),
            lambda: deployment.read_states([5, 6]),
        ):
            with pytest.raises(BackendError, match="onnxruntime-cpu"):
                call()
        assert deployment.run(input_ids=rows(4), tasks="words")["logits"].shape[1] == 4


def test_a_kv_cache_in_8_bits_refuses(llama: Prefixed, tmp_path: Path) -> None:
    folder = shutil.copytree(llama.folder, tmp_path / "deployment")
    export_kv_cache(folder)
    with Deployment.open(folder, kv_cache_dtype="int8") as deployment:
        with pytest.raises(BackendError, match="without kv_cache_dtype"):
            deployment.generate(rows(4), tasks="before", max_new_tokens=2)
        deployment.generate(rows(4), tasks="words", max_new_tokens=2)


@pytest.mark.slow
def test_a_base_in_half_keeps_the_prefix_in_half(tmp_path: Path) -> None:
    own = build_prefixed("llama", tmp_path, dtype="float16")
    (ids,) = rows(7)
    with Deployment.open(own.folder) as deployment:
        states = deployment.kv_prefix("before")
        assert states is not None
        assert states.dtype == np.float16
        received = deployment.run(input_ids=[ids], tasks="before")["logits"][0]
    with torch.no_grad():
        expected, _ = own.output(ids, "before")
    assert np.abs(received - expected).max() <= 0.05 * np.abs(expected).max()


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], np.ndarray]) -> None:
    made = registry.kv_prefixes_of
    monkeypatch.setattr(
        registry,
        "kv_prefixes_of",
        lambda *given: [replace(prefix, states=change(prefix.states)) for prefix in made(*given)],
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda states: states.reshape(-1, 2, *states.shape[1:])[:, ::-1].reshape(states.shape),
        lambda states: np.roll(states, 2, axis=0),
        lambda states: states[:, ::-1],
    ],
    ids=["keys-and-values", "layer", "heads"],
)
def test_states_in_another_order_show(
    llama: Prefixed, monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    plant(monkeypatch, change)
    (ids,) = rows(7)
    expected, limit = llama.output(ids, "before")
    with Deployment.open(llama.folder) as deployment:
        received = deployment.run(input_ids=[ids], tasks="before")["logits"][0]
    assert np.abs(received - expected).max() > 100 * limit


def test_images_stand_behind_a_kv_prefix(vision_deployment: VisionDeployment, tmp_path: Path) -> None:
    adapter = prefix_adapter(read_manifest(vision_deployment.folder).base, 7, **SETTINGS["before"])
    model = vision_deployment.model
    with Deployment.open(vision_deployment.folder) as deployment:
        deployment.add_task(write_adapter(tmp_path / "before", adapter))
        ids = vision_deployment.inputs(deployment.tokenizer.encode("a @b"), [])["input_ids"].numpy()
        embeds = torch.tensor(deployment.input_embeddings(ids, images=[[picture(2)]]))
        received = deployment.run(input_ids=ids, tasks="before", images=[[picture(2)]])["logits"][0]
    cache = DynamicCache(config=model.config.get_text_config())
    for layer, (key, value) in enumerate(torch.tensor(adapter.weights["kv_prefix"])):
        cache.update(key[None], value[None], layer)
    mask = torch.ones(1, 5 + embeds.shape[1], dtype=torch.int64)
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, past_key_values=cache, attention_mask=mask).logits[0].numpy()
        plain = model(inputs_embeds=embeds).logits[0].numpy()
    np.testing.assert_allclose(received, expected, rtol=0, atol=2e-5)
    assert np.abs(plain - expected).max() > 0.01
