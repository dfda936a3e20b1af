"""Soft prompts and tables of token ids: what an engine gives behind them is what PyTorch gives."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from helpers.host_device import HostBackend
from helpers.runtime import random_adapter, write_adapter
from helpers.soft_prompts import EVERY, TASKS, Soft, build_soft, padded
from helpers.vision_deployments import VisionDeployment, picture

from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import ContractError, RequestError
from adalink.runtime.options import OpenOptions
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.adapter import SOFT_PROMPT_NAME, make_adapter
from adalink.runtime.storage.contract import check_adapter
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.tasks.adapter_mapping import AdapterMapping, TokenEmbeddingDelta, mix
from adalink.runtime.tasks.folding import RankFold
from adalink.runtime.tasks.soft_prompt import SoftPrompt

NEW = 8
PROFILE = Profile(batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 4, 5), past=ShapeRange(0, 8, 55))


def rows(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(lengths)
    return [rng.integers(3, 96, length).tolist() for length in lengths]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Soft:
    return build_soft(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Soft:
    own = build_soft("llama", tmp_path_factory.mktemp("soft-llama"))
    export_base(own.model, own.folder, target="portable")
    return own


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Soft:
    return build_soft("bert", tmp_path_factory.mktemp("soft-bert"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Soft:
    return build_soft("t5", tmp_path_factory.mktemp("soft-t5"))


def check_alone_and_mixed(own: Soft, name: str, *, left: bool) -> None:
    lengths = rows(7, 3, 10, 1, 6, 10, 4, 2)
    with Deployment.open(own.folder) as deployment:
        expected = [own.output(ids, task) for ids, task in zip(lengths, EVERY, strict=True)]
        for ids, task, (output, limit) in zip(lengths, EVERY, expected, strict=True):
            received = deployment.run(input_ids=[ids], tasks=task)[name][0]
            assert received.shape == output.shape, task
            assert np.abs(received - output).max() <= limit, task
            assert task is None or np.abs(output - own.output(ids, None)[0]).max() > 100 * limit, task
        ids, mask, places = padded(lengths, left=left)
        together = deployment.run(input_ids=ids, attention_mask=mask, tasks=EVERY)[name]
        assert together.shape[:2] == ids.shape
        for row, (place, (output, limit)) in enumerate(zip(places, expected, strict=True)):
            assert np.abs(together[row, place] - output).max() <= limit, EVERY[row]


def test_a_decoder_alone_and_in_a_mixed_batch(decoder: Soft) -> None:
    check_alone_and_mixed(decoder, "logits", left=True)


def test_a_decoder_padded_on_the_right(llama: Soft) -> None:
    check_alone_and_mixed(llama, "logits", left=False)


def test_an_encoder_alone_and_in_a_mixed_batch(bert: Soft) -> None:
    check_alone_and_mixed(bert, "last_hidden_state", left=False)


@pytest.mark.parametrize("left", [True, False])
def test_the_encoder_of_an_encoder_decoder(t5: Soft, left: bool) -> None:
    check_alone_and_mixed(t5, "last_hidden_state", left=left)


@pytest.mark.parametrize("task", EVERY)
def test_a_decoder_attends_to_the_soft_prompt_of_its_encoder(t5: Soft, task: str | None) -> None:
    (ids, decoder_ids) = rows(6, 4)
    with Deployment.open(t5.folder) as deployment:
        found = deployment.run(input_ids=[ids], tasks=task, decoder_input_ids=[decoder_ids])["logits"][0]
    expected, limit = t5.output(ids, task, decoder_input_ids=torch.tensor([decoder_ids]))
    assert np.abs(found - expected).max() <= limit


def check_generation(own: Soft, deployment: Deployment, tasks: list[str | None]) -> None:
    prompts = rows(7, 3, 9, 2, 5, 8, 4, 6)[: len(tasks)]
    expected = [own.greedy(prompt, task, NEW) for prompt, task in zip(prompts, tasks, strict=True)]
    found = deployment.generate(prompts, tasks=tasks, max_new_tokens=NEW)
    for prompt, row, wanted, task in zip(prompts, found, expected, tasks, strict=True):
        assert list(row.token_ids) == wanted, task
        assert row.prompt_tokens == len(prompt)
        assert deployment.generate([prompt], tasks=task, max_new_tokens=NEW)[0] == row, task


def test_generation_is_pytorchs(decoder: Soft) -> None:
    with Deployment.open(decoder.folder) as deployment:
        check_generation(decoder, deployment, EVERY)


def test_generation_of_an_encoder_decoder(t5: Soft) -> None:
    with Deployment.open(t5.folder) as deployment:
        check_generation(t5, deployment, EVERY)


def test_generation_with_a_cache_that_grows(llama: Soft) -> None:
    with Deployment.open(llama.folder, variant="portable") as deployment:
        check_generation(llama, deployment, EVERY)


@pytest.mark.parametrize("in_place", [True, False])
def test_generation_on_a_device(llama: Soft, in_place: bool) -> None:
    host = HostBackend(PROFILE, in_place=in_place)
    with Deployment(llama.folder, read_manifest(llama.folder), host, OpenOptions("portable")) as deployment:
        for tasks in ([None, "soft", "ids"], ["both", "asked", "words"], ["ids-asked", "soft-too", "both"]):
            check_generation(llama, deployment, tasks)
        for task in EVERY:
            (ids,) = rows(7)
            expected, limit = llama.output(ids, task)
            found = deployment.run(input_ids=[ids], tasks=task)["logits"][0]
            assert np.abs(found - expected).max() <= limit


def test_kept_prefixes_know_soft_prompts(llama: Soft, resumed: list[int]) -> None:
    (first, second) = rows(9, 5)
    with Deployment.open(llama.folder, prefix_cache_bytes=1 << 20) as deployment:
        for prompt in (first, [*first[:6], *second]):
            for task in EVERY:
                found = deployment.generate([prompt], tasks=task, max_new_tokens=NEW)[0]
                assert list(found.token_ids) == llama.greedy(prompt, task, NEW), task
        known = dict(zip(EVERY, resumed, strict=True))
        for task in EVERY:
            soft_tokens = TASKS[task].get("soft_tokens", 0) if task else 0
            assert known[task] == soft_tokens + 6, task
        check_generation(llama, deployment, EVERY)


def test_names_that_do_not_tell_soft_prompts_apart_give_other_tokens(
    llama: Soft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that the test above exists to find."""
    monkeypatch.setattr(SoftPrompt, "cache_keys", lambda self: np.full(len(self.vectors), -1))
    (prompt,) = rows(9)
    with Deployment.open(llama.folder, prefix_cache_bytes=1 << 20) as deployment:
        found = [deployment.generate([prompt], tasks=task, max_new_tokens=NEW)[0] for task in ("soft", "soft-too")]
    assert list(found[0].token_ids) == llama.greedy(prompt, "soft", NEW)
    assert list(found[1].token_ids) != llama.greedy(prompt, "soft-too", NEW)


def test_images_are_not_looked_up_by_the_id_of_their_placeholder(
    vision_deployment: VisionDeployment, tmp_path: Path
) -> None:
    base = read_manifest(vision_deployment.folder).base
    adapter = random_adapter(base.fingerprint, base.hidden_size, 6, **TASKS["ids"])
    with Deployment.open(vision_deployment.folder) as deployment:
        deployment.add_task(write_adapter(tmp_path / "own", adapter))
        ids = vision_deployment.inputs(deployment.tokenizer.encode("a @b"), [])["input_ids"].numpy()
        plain = deployment.input_embeddings(ids, images=[[picture(2)]])
        found = deployment.input_embeddings(ids, tasks="own", images=[[picture(2)]])
    delta = adapter.weights["text.table.weight"][ids] @ adapter.weights["text.up.weight"].T
    expected = np.where((ids == base.vision.image_token_id)[..., None], plain, plain + delta)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_images_go_on_working_beside_soft_prompts(vision_deployment: VisionDeployment, tmp_path: Path) -> None:
    prompts, images = ["@what?", "a @b", "no picture", "a @b"], [[picture(1)], [picture(2)], [], [picture(2)]]
    base = read_manifest(vision_deployment.folder).base
    settings = {"rank": 3, "activation": "tanh", "bias": False, "scope": "all", "modalities": ("image", "text")}
    adapter = random_adapter(base.fingerprint, base.hidden_size, 5, soft_tokens=4, **settings)
    with Deployment.open(vision_deployment.folder) as deployment:
        deployment.add_task(write_adapter(tmp_path / "soft", adapter))
        tasks = ["both", "soft", None, "looks"]
        found = deployment.generate(prompts, images=images, tasks=tasks, max_new_tokens=6)
        for row, (prompt, own, task) in enumerate(zip(prompts, images, tasks, strict=True)):
            alone = deployment.generate([prompt], images=[own], tasks=task, max_new_tokens=6)[0]
            assert alone == found[row]
            if task != "soft":
                tokens = deployment.tokenizer.encode(prompt)
                assert list(alone.token_ids) == vision_deployment.greedy(tokens, own, task, 6)
        # The same embeddings without a soft prompt of the task's own, with it put before them by hand.
        tokens = deployment.tokenizer.encode("a @b")
        ids = vision_deployment.inputs(tokens, [])["input_ids"].numpy()
        adapted = deployment.input_embeddings(ids, tasks="soft", images=[[picture(2)]])
        whole = np.concatenate([adapter.weights["soft_prompt"][None], adapted], axis=1)
        by_hand = deployment.run(inputs_embeds=whole)["logits"][0, 4:]
        received = deployment.run(input_ids=ids, tasks="soft", images=[[picture(2)]])["logits"][0]
        np.testing.assert_allclose(received, by_hand, rtol=0, atol=1e-5)


def test_embed_gives_the_given_positions_alone(llama: Soft) -> None:
    (ids,) = rows(6)
    with Deployment.open(llama.folder) as deployment:
        for task in EVERY:
            expected = llama.embeds(ids, task)[:, -6:].numpy()
            np.testing.assert_allclose(deployment.input_embeddings([ids], tasks=task), expected, rtol=0, atol=1e-5)


def test_given_embeddings_stand_behind_the_soft_prompt(llama: Soft) -> None:
    (ids,) = rows(6)
    with Deployment.open(llama.folder) as deployment:
        expected = deployment.run(input_ids=[ids], tasks="both")["logits"]
        received = deployment.run(inputs_embeds=deployment.input_embeddings([ids]), tasks="both")["logits"]
        np.testing.assert_array_equal(received, expected)
        with pytest.raises(RequestError, match="pass input_ids"):
            deployment.run(inputs_embeds=deployment.input_embeddings([ids]), tasks=["ids"])


def test_positions_of_no_text_are_not_looked_up(llama: Soft) -> None:
    (ids,) = rows(5)
    modality = np.array([[0, -1, 0, 0, -1]])
    with Deployment.open(llama.folder) as deployment:
        plain, adapted = deployment.input_embeddings([ids]), deployment.input_embeddings([ids], tasks="ids")
        received = deployment.input_embeddings([ids], tasks="ids", modality=modality)
    np.testing.assert_array_equal(received, np.where((modality == 0)[..., None], adapted, plain))


def test_rows_that_go_and_change_places_keep_their_tables() -> None:
    rng = np.random.default_rng(4)
    table = rng.normal(size=(20, 6))
    folds = [RankFold(rng.normal(size=(20, 2)), rng.normal(size=(6, 2)), None) for _ in range(2)]
    alone = [
        AdapterMapping([], deltas=[TokenEmbeddingDelta(None, "all", str(index), fold)])
        for index, fold in enumerate(folds)
    ]
    mixed = mix([(alone[0], np.array([0, 3])), (alone[1], np.array([2]))])
    ids = rng.integers(0, 20, (4, 5))
    stored = EmbeddingTable(table, "float32")
    whole = mixed.lookup(stored, ids)
    np.testing.assert_allclose(whole[2], table[ids[2]] + folds[1].hidden[ids[2]] @ folds[1].up.T)
    np.testing.assert_array_equal(whole[1], table[ids[1]])
    for kept in ([3, 1, 2], [2, 0], [1], [3, 0]):
        np.testing.assert_array_equal(mixed.take(kept).lookup(stored, ids[kept]), whole[kept])
    assert not mixed.take([1]).needs_ids
    assert [digest for digest, _ in mixed.adapters(4)] == ["0", "", "1", "0"]


def test_the_soft_prompt_counts_towards_the_longest_sequence(llama: Soft) -> None:
    (ids,) = rows(59)
    with Deployment.open(llama.folder) as deployment:
        deployment.run(input_ids=[ids], tasks="soft")
        with pytest.raises(RequestError, match="65 positions"):
            deployment.run(input_ids=[[*ids, 5]], tasks="soft")
        deployment.generate([ids], tasks="both", max_new_tokens=3)
        with pytest.raises(RequestError, match="65 positions"):
            deployment.generate([ids], tasks="both", max_new_tokens=4)
        # A short row with a long soft prompt beside a long row without one: the batch is no longer than its rows.
        long, mask, _ = padded([ids, ids[:3]], left=True)
        deployment.run(
            input_ids=np.pad(long, ((0, 0), (3, 0))),
            attention_mask=np.pad(mask, ((0, 0), (3, 0))),
            tasks=["soft", "soft"],
        )


@pytest.mark.parametrize("left", [True, False])
def test_a_batch_is_as_wide_as_its_longest_row(llama: Soft, left: bool) -> None:
    """Whichever side the padding is on: 60 tokens beside 5 vectors and 3 tokens fit into 64 positions."""
    own = rows(60, 3, 8)
    ids, mask, places = padded(own, left=left)
    tasks = [None, "soft", "both"]
    with Deployment.open(llama.folder) as deployment:
        together = deployment.run(input_ids=ids, attention_mask=mask, tasks=tasks)["logits"]
    for row, (tokens, task, place) in enumerate(zip(own, tasks, places, strict=True)):
        output, limit = llama.output(tokens, task)
        assert np.abs(together[row, place] - output).max() <= limit, task


def test_an_adapter_that_does_not_fit_is_refused(llama: Soft, tmp_path: Path) -> None:
    base = read_manifest(llama.folder).base
    plain = {"activation": "identity", "bias": False, "scope": "all"}
    long = random_adapter(base.fingerprint, base.hidden_size, 1, rank=0, soft_tokens=64, **plain)
    table = llama.adapters["ids"].weights["text.table.weight"]
    other = dict(llama.adapters["ids"].weights) | {"text.table.weight": table[:-1]}
    with Deployment.open(llama.folder) as deployment:
        with pytest.raises(ContractError, match="soft prompt of 64 positions"):
            deployment.add_task(write_adapter(tmp_path / "long", long))
        with pytest.raises(ContractError, match=r"table of 95 token ids, .* has 96"):
            deployment.add_task(write_adapter(tmp_path / "other", make_adapter(llama.adapters["ids"].config, other)))


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65504.0), ("bfloat16", 3.3895e38), ("float32", 3.4028e38)])
def test_numbers_beyond_the_dtype_of_the_base_are_refused(llama: Soft, dtype: str, largest: float) -> None:
    base = msgspec.structs.replace(read_manifest(llama.folder).base, embedding_dtype=dtype)
    plain = {"activation": "identity", "bias": False, "scope": "all"}
    weights = dict(random_adapter(base.fingerprint, base.hidden_size, 1, rank=0, soft_tokens=3, **plain).weights)
    for number in (largest, -largest):
        vectors = weights[SOFT_PROMPT_NAME].copy()
        vectors[2, 5] = number
        config = random_adapter(base.fingerprint, base.hidden_size, 1, rank=0, soft_tokens=3, **plain).config
        check_adapter(make_adapter(config, {SOFT_PROMPT_NAME: vectors}), base, "it")
        if dtype != "float32":
            vectors[2, 5] = number * 1.003
            with pytest.raises(ContractError, match=f"it: the soft prompt holds numbers beyond {dtype}"):
                check_adapter(make_adapter(config, {SOFT_PROMPT_NAME: vectors}), base, "it")


def test_tasks_come_and_go(llama: Soft) -> None:
    (ids,) = rows(7)
    with Deployment.open(llama.folder, task_memory_bytes=1 << 10) as deployment:
        before = {task: deployment.run(input_ids=[ids], tasks=task)["logits"] for task in EVERY}
        for task in reversed(EVERY):
            np.testing.assert_array_equal(deployment.run(input_ids=[ids], tasks=task)["logits"], before[task])
