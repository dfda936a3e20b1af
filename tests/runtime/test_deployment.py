"""An open deployment against PyTorch: every task, mixed batches, padding, modalities, adding and removing tasks."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers.runtime import random_adapter, write_adapter

from adalink.runtime import Deployment
from adalink.runtime.errors import (
    AdapterError,
    BackendUnavailableError,
    ContractError,
    RequestError,
    UnknownTaskError,
)
from adalink.runtime.request import check_embeds
from adalink.runtime.storage.manifest_io import read_manifest

# Float32 through two layers of width 48: sums of at most 80 terms, six in a row, of logits around 10.
LIMIT = 80 * 6 * 2**-24 * 10


def random_ids(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(4, 96, length)]


@pytest.mark.parametrize("task", [None, "alpha", "beta", "prompted"])
def test_logits_equal_pytorch(llama: Any, deployment: Deployment, task: str | None) -> None:
    ids = random_ids(11)
    logits = deployment.run(input_ids=[ids], tasks=task)["logits"]
    assert logits.shape == (1, 11, 96)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[0], llama.logits(ids, task), rtol=0, atol=LIMIT)


def test_each_task_changes_the_output(llama: Any, deployment: Deployment) -> None:
    ids = [random_ids(11)]
    outputs = [deployment.run(input_ids=ids, tasks=task)["logits"] for task in (None, *llama.adapters)]
    for first in range(len(outputs)):
        for second in range(first):
            assert np.abs(outputs[first] - outputs[second]).max() > 1000 * LIMIT


def test_mixed_batch_with_padding_equals_rows_alone(llama: Any, deployment: Deployment) -> None:
    rows = [random_ids(length, seed=length) for length in (3, 9, 6, 1, 9)]
    tasks = ["alpha", None, "beta", "alpha", "prompted"]
    ids, mask = np.zeros((5, 9), np.int64), np.zeros((5, 9), np.int64)
    for index, row in enumerate(rows):
        ids[index, 9 - len(row) :], mask[index, 9 - len(row) :] = row, 1
    logits = deployment.run(input_ids=ids, attention_mask=mask, tasks=tasks)["logits"]
    for index, row in enumerate(rows):
        own = logits[index, 9 - len(row) :]
        np.testing.assert_allclose(own, llama.logits(row, tasks[index]), rtol=0, atol=LIMIT)
        wrong = llama.logits(row, "beta" if tasks[index] != "beta" else "alpha")
        assert np.abs(own - wrong).max() > 1000 * LIMIT


def test_swapping_leaves_no_trace(deployment: Deployment) -> None:
    ids = [random_ids(8)]
    outputs = [deployment.run(input_ids=ids, tasks=task)["logits"] for task in (None, "alpha", "beta", "alpha", None)]
    np.testing.assert_array_equal(outputs[0], outputs[4])
    np.testing.assert_array_equal(outputs[1], outputs[3])


def test_given_embeddings_are_adapted_the_same_way(deployment: Deployment) -> None:
    ids = [random_ids(8), random_ids(8, 1)]
    plain = deployment.input_embeddings(ids)
    np.testing.assert_array_equal(
        deployment.run(inputs_embeds=plain, tasks=["beta", None])["logits"],
        deployment.run(input_ids=ids, tasks=["beta", None])["logits"],
    )
    adapted = deployment.input_embeddings(ids, tasks=["beta", None])
    np.testing.assert_array_equal(adapted[1], plain[1])
    assert not np.array_equal(adapted[0], plain[0])


def test_modalities_are_adapted_apart(llama: Any, deployment: Deployment) -> None:
    ids = [random_ids(6)]
    modality = np.array([[0, 1, -1, 1, 0, -1]])
    plain = torch.tensor(deployment.input_embeddings(ids))
    text, image = llama.adapted(plain, "double", "text"), llama.adapted(plain, "double", "image")
    expected = torch.stack([{0: text, 1: image, -1: plain}[int(m)][0, i] for i, m in enumerate(modality[0])])
    adapted = deployment.input_embeddings(ids, tasks="double", modality=modality)[0]
    np.testing.assert_allclose(adapted, expected.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(adapted[[2, 5]], plain.numpy()[0, [2, 5]])
    np.testing.assert_allclose(
        deployment.input_embeddings(ids, tasks="double")[0], text.numpy()[0], rtol=1e-5, atol=1e-6
    )
    only_text = deployment.input_embeddings(ids, tasks="alpha", modality=modality)[0]
    np.testing.assert_array_equal(only_text[modality[0] != 0], plain.numpy()[0, modality[0] != 0])
    np.testing.assert_array_equal(only_text[[0, 4]], deployment.input_embeddings(ids, tasks="alpha")[0, [0, 4]])


def test_encoder(bert: Any) -> None:
    ids, mask = [random_ids(7), random_ids(7, 1)], [[1] * 7, [1] * 4 + [0] * 3]
    with Deployment.open(bert.folder) as opened:
        hidden = opened.run(input_ids=ids, attention_mask=mask, tasks=["beta", "alpha"])["last_hidden_state"]
        with pytest.raises(RequestError, match=r"encoder.*run\(\)"):
            opened.generate(["abc"])
    for row, task, length in ((0, "beta", 7), (1, "alpha", 4)):
        with torch.no_grad():
            reference = bert.model(inputs_embeds=bert.embeds(ids[row][:length], task)).last_hidden_state[0].numpy()
        np.testing.assert_allclose(hidden[row, :length], reference, rtol=0, atol=LIMIT)


def test_encoder_decoder(t5: Any) -> None:
    ids, decoder_ids = [random_ids(7), random_ids(7, 1)], [[0, 9, 12], [0, 30, 4]]
    with Deployment.open(t5.folder) as opened:
        out = opened.run(input_ids=ids, tasks=["beta", None], decoder_input_ids=decoder_ids)
        texts = opened.generate(["abcdefg", "x y"], tasks=["alpha", None], max_new_tokens=8)
    for row, task in enumerate(["beta", None]):
        with torch.no_grad():
            reference = t5.model(
                inputs_embeds=t5.embeds(ids[row], task), decoder_input_ids=torch.tensor([decoder_ids[row]])
            )
        np.testing.assert_allclose(out["logits"][row], reference.logits[0].numpy(), rtol=0, atol=LIMIT)
    for prompt, task, result in zip(["abcdefg", "x y"], ["alpha", None], texts, strict=True):
        tokens = [ord(character) - ord(" ") + 4 for character in prompt]
        made = [0]
        while len(made) < 9:
            with torch.no_grad():
                step = t5.model(inputs_embeds=t5.embeds(tokens, task), decoder_input_ids=torch.tensor([made]))
            made.append(int(step.logits[0, -1].argmax()))
        assert list(result.token_ids) == made[1:]


def test_tasks_can_be_added_removed_and_unloaded(llama: Any, tmp_path: Path) -> None:
    folder = tmp_path / "gamma"
    shutil.copytree(llama.folder / "tasks" / "alpha", folder)
    ids = [random_ids(5)]
    with Deployment.open(llama.folder) as opened:
        before = opened.run(input_ids=ids, tasks="alpha")["logits"]
        assert opened.add_task(folder) == "gamma"
        assert opened.tasks == ("alpha", "beta", "double", "gamma", "prompted")
        np.testing.assert_array_equal(opened.run(input_ids=ids, tasks="gamma")["logits"], before)
        with pytest.raises(RequestError, match="'gamma' is deployed already"):
            opened.add_task(folder)
        opened.remove_task("gamma")
        with pytest.raises(UnknownTaskError, match=r"'gamma'.*alpha, beta, double, prompted"):
            opened.run(input_ids=ids, tasks="gamma")
        opened.unload_task("alpha")
        np.testing.assert_array_equal(opened.run(input_ids=ids, tasks="alpha")["logits"], before)
        receipt = opened.receipt()
    assert (receipt.engine_builds, receipt.unchanged) == (1, True)
    with Deployment.open(llama.folder) as opened:
        assert "gamma" not in opened.tasks


def test_a_task_folder_that_does_not_fit_is_refused(llama: Any, tmp_path: Path) -> None:

    foreign = random_adapter("sha256:" + "0" * 64, 48, 9, rank=2, activation="relu", bias=False, scope="all")
    folder = tmp_path / "foreign"
    shutil.copytree(llama.folder / "tasks" / "alpha", folder)
    with Deployment.open(llama.folder) as opened:
        write_adapter(folder, foreign)
        with pytest.raises(
            ContractError, match=rf"{foreign.config.base_fingerprint}.*{opened.manifest.base.fingerprint}"
        ):
            opened.add_task(folder)
        config = llama.adapters["alpha"].config
        heard = {"rank": 2, "activation": "relu", "bias": False, "scope": "all", "modalities": ("text", "audio")}
        write_adapter(folder, random_adapter(config.base_fingerprint, 48, 9, **heard))
        with pytest.raises(ContractError, match=r"modality 'audio'.*exported for text, image"):
            opened.add_task(folder)
        narrow = {"rank": 2, "activation": "relu", "bias": False, "scope": "all"}
        write_adapter(folder, random_adapter(config.base_fingerprint, 32, 9, **narrow))
        with pytest.raises(ContractError, match=r"hidden_size 32, .* has 48: its adapter_config\.json"):
            opened.add_task(folder)
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is missing"):
            opened.add_task(folder)
        assert "foreign" not in opened.tasks


def test_threads_get_the_answers_they_would_get_alone(llama: Any) -> None:
    requests = [(random_ids(4 + seed % 5, seed), (None, *llama.adapters)[seed % 5]) for seed in range(20)]
    with Deployment.open(llama.folder, threads=1) as opened:
        alone = [opened.run(input_ids=[ids], tasks=task)["logits"] for ids, task in requests]
        for task in llama.adapters:
            opened.unload_task(task)
        failures: list[object] = []

        def work(offset: int) -> None:
            for step in range(len(requests)):
                index = (offset + step) % len(requests)
                ids, task = requests[index]
                if not np.array_equal(opened.run(input_ids=[ids], tasks=task)["logits"], alone[index]):
                    failures.append((index, task))

        threads = [threading.Thread(target=work, args=(offset,)) for offset in range(0, 20, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_a_generation_ends_with_the_task_it_began_with(llama: Any, tmp_path: Path) -> None:
    """Another task takes the name after the first piece of text: the rest must not come from it."""
    other = Path(shutil.copytree(llama.folder / "tasks" / "beta", tmp_path / "beta"))
    with Deployment.open(llama.folder) as opened:
        alone = {task: opened.generate(["wheat"], tasks=task, max_new_tokens=16)[0] for task in ("alpha", "beta")}
        pieces: list[str] = []

        def exchange(row: int, piece: str) -> None:
            if not pieces:
                opened.remove_task("alpha")
                opened.add_task(other, "alpha")
            pieces.append(piece)

        assert opened.generate(["wheat"], tasks="alpha", max_new_tokens=16, stream=exchange)[0] == alone["alpha"]
        assert opened.generate(["wheat"], tasks="alpha", max_new_tokens=16)[0] == alone["beta"]
    assert alone["alpha"] != alone["beta"]
    assert len(pieces) > 2


@pytest.mark.parametrize(
    "call",
    [
        lambda opened: opened.run(input_ids=[[5]]),
        lambda opened: opened.input_embeddings([[5]]),
        lambda opened: opened.generate(["a"], max_new_tokens=2),
        lambda opened: opened.load_task("alpha"),
        lambda opened: opened.add_task(opened.path / "tasks" / "alpha", "gamma"),
    ],
    ids=["run", "embed", "generate", "load_task", "add_task"],
)
def test_a_closed_deployment_says_so(llama: Any, call: Callable[[Deployment], object]) -> None:
    with Deployment.open(llama.folder) as opened:
        call(opened)
    with pytest.raises(RequestError, match="the deployment is closed: open it again"):
        call(opened)


@pytest.mark.parametrize(
    ("request_", "wording"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": [[5, 96]]}, "holds 96, expected 0 to 95"),
        ({"input_ids": [[5, -1]]}, "holds -1"),
        ({"input_ids": [[5] * 40, [5] * 39 + [-2]]}, "holds -2"),
        ({"input_ids": [[5] * 40, [5] * 39 + [97]]}, "holds 97"),
        ({"input_ids": [[5.0, 6.0]]}, "dtype float64"),
        ({"input_ids": [[True, False]]}, "dtype bool"),
        ({"input_ids": [5, 6]}, r"shape \(2,\)"),
        ({"input_ids": np.zeros((0, 4), np.int64)}, r"shape \(0, 4\)"),
        ({"input_ids": np.zeros((2, 0), np.int64)}, r"shape \(2, 0\)"),
        ({"input_ids": [[5, 6], [7]]}, "not a rectangular array"),
        ({"input_ids": [[5] * 65]}, "65 positions.*at most 64"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, r"shape \(1, 1\), expected \(1, 2\)"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1, 2]]}, "other than 0"),
        ({"input_ids": [[5, 6]], "attention_mask": [[0, 0]]}, "row 0 is all padding"),
        ({"input_ids": [[5, 6]], "attention_mask": [[0.5, 1.0]]}, "dtype float64"),
        ({"input_ids": [[5, 6]], "tasks": "nothing"}, "task 'nothing' is not deployed"),
        ({"input_ids": [[5, 6]], "tasks": ["alpha", None]}, "2 entries for 1 rows"),
        ({"input_ids": [[5, 6]], "modality": [[0, 2]]}, "expected -1"),
        ({"input_ids": [[5, 6]], "modality": [[0]]}, r"expected int64 with shape \(1, 2\)"),
        ({"input_ids": [[5, 6]], "decoder_input_ids": [[5]]}, "decoder_input_ids is for encoder-decoders; .* is none"),
        ({"inputs_embeds": np.zeros((1, 2, 48))}, "dtype float64"),
        ({"inputs_embeds": np.zeros((1, 2, 47), np.float32)}, "shape"),
        ({"inputs_embeds": np.full((1, 2, 48), np.nan, np.float32)}, "NaN"),
        ({"inputs_embeds": np.full((1, 2, 48), -np.inf, np.float32)}, "NaN"),
    ],
)
def test_bad_requests_are_refused_by_name(deployment: Deployment, request_: dict[str, Any], wording: str) -> None:
    with pytest.raises(RequestError, match=wording):
        deployment.run(**request_)


@pytest.mark.parametrize(
    ("bits", "fits"),
    [(0x7F7F, True), (0xFF7F, True), (0x8000, True), (0x0001, True), (0x7F80, False), (0xFF80, False), (0x7FC1, False)],
)
def test_bits_of_bfloat16_are_numbers(llama: Any, bits: int, fits: bool) -> None:
    """As PyTorch reads them: the largest number, zero and the smallest, then infinity and NaN."""
    base = msgspec.structs.replace(read_manifest(llama.folder).base, embedding_dtype="bfloat16")
    embeds = np.zeros((1, 2, 48), np.uint16)
    embeds[0, 1, 7] = bits
    assert bool(torch.from_numpy(embeds.view(np.int16)).view(torch.bfloat16).isfinite().all()) == fits
    if fits:
        assert check_embeds(embeds, base) is embeds
    else:
        with pytest.raises(RequestError, match="NaN or infinity"):
            check_embeds(embeds, base)


def test_embeddings_may_lie_in_any_order_of_memory(deployment: Deployment) -> None:
    embeds = deployment.input_embeddings([random_ids(8), random_ids(8, 1)])
    expected = deployment.run(inputs_embeds=embeds)["logits"]
    turned = np.ascontiguousarray(embeds.transpose(2, 0, 1)).transpose(1, 2, 0)
    assert not turned.flags.c_contiguous
    np.testing.assert_array_equal(deployment.run(inputs_embeds=turned)["logits"], expected)
    started = deployment._runner.engine.start({"inputs_embeds": turned, "attention_mask": np.ones((2, 8), np.int64)}, 1)
    np.testing.assert_allclose(started.logits, expected[:, -1], atol=LIMIT)


def test_an_unknown_backend_and_bad_thread_count(llama: Any) -> None:
    with pytest.raises(BackendUnavailableError, match="expected one of onnxruntime-cpu"):
        Deployment.open(llama.folder, "quantum")
    with pytest.raises(RequestError, match="threads is 0"):
        Deployment.open(llama.folder, threads=0)
