"""Engines whose memory stays on a device, against PyTorch: the kit's own code, with main memory as the device.

The engine's graph and the embedders are those that TensorRT engines are built from; ONNX Runtime computes them here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.host_device import HostBackend, HostPlans
from helpers.runtime import TASKS, Tiny, build
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.base import variant
from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from adalink.runtime.device import forward as passes
from adalink.runtime.device.engine import DeviceEngine
from adalink.runtime.errors import BackendError, GraphError, RequestError
from adalink.runtime.options import OpenOptions
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.embedding_table import EmbeddingTable
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.manifest_io import read_manifest

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
PROFILE = Profile(batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 4, 5), past=ShapeRange(0, 8, 55))
PROMPTS = [[5, 9, 33, 41, 7, 60, 12], [8, 70, 3], [90, 4, 77, 21, 15]]
EVERY = [None, *TASKS]


def opened(tiny: Tiny, backend: HostBackend) -> Deployment:
    return Deployment(tiny.folder, read_manifest(tiny.folder), backend, OpenOptions("portable"))


def portable(family: str, root: Path, modalities: tuple[str, ...] = ("text",)) -> Tiny:
    tiny = build(family, root, modalities)
    export_base(tiny.model, tiny.folder, target="portable", modalities=modalities)
    return tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return portable("llama", tmp_path_factory.mktemp("device"), ("text", "image"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return portable("bert", tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return portable("gemma3", tmp_path_factory.mktemp("device"))


@pytest.fixture(params=[True, False], ids=["in-place", "growing"])
def host(request: pytest.FixtureRequest) -> HostBackend:
    return HostBackend(PROFILE, in_place=request.param)


def padded(prompts: list[list[int]], *, left: bool = True) -> tuple[np.ndarray, np.ndarray]:
    longest = max(map(len, prompts))
    ids, mask = (np.zeros((len(prompts), longest), np.int64) for _ in range(2))
    for row, tokens in enumerate(prompts):
        place = slice(longest - len(tokens), longest) if left else slice(0, len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("task", EVERY)
def test_whole_sequences_agree_with_pytorch(llama: Tiny, host: HostBackend, task: str | None, left: bool) -> None:
    """Prompts longer than a pass takes, padded on either side."""
    ids, mask = padded(PROMPTS, left=left)
    with opened(llama, host) as deployment:
        logits = deployment.run(input_ids=ids, attention_mask=mask, tasks=task)["logits"]
    for row, tokens in enumerate(PROMPTS):
        np.testing.assert_allclose(logits[row][mask[row] == 1], llama.logits(tokens, task), **CLOSE)


def test_outputs_that_are_not_numbers_are_named(
    tmp_path: Path, host: HostBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    monkeypatch.setattr(variant, "check_activations", lambda *given: None)
    export_base(model, tmp_path, target="portable", tokenizer=make_tokenizer())
    with Deployment(tmp_path, read_manifest(tmp_path), host, OpenOptions("portable")) as deployment:
        with pytest.raises(BackendError, match=r"row 0 \(base model\): the engine's logits for new token 1 hold NaN"):
            deployment.generate(PROMPTS, max_new_tokens=3)
        with pytest.raises(BackendError, match="logits at position 0 hold NaN"):
            deployment.run(input_ids=[PROMPTS[0]])


def test_more_rows_than_a_pass_takes_go_in_groups(llama: Tiny, host: HostBackend) -> None:
    rows = [PROMPTS[index % 3] for index in range(7)]
    tasks = [EVERY[index % len(EVERY)] for index in range(7)]
    ids, mask = padded(rows)
    with opened(llama, host) as deployment:
        logits = deployment.run(input_ids=ids, attention_mask=mask, tasks=tasks)["logits"]
    for row, (tokens, task) in enumerate(zip(rows, tasks, strict=True)):
        np.testing.assert_allclose(logits[row][mask[row] == 1], llama.logits(tokens, task), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_generation_agrees_with_pytorch(family: str, host: HostBackend, request: pytest.FixtureRequest) -> None:
    """A mixed batch whose rows end at different times, over windows and rounded totals, from records too."""
    tiny: Tiny = request.getfixturevalue(family)
    texts = ["the oil price", "a", "grain and ships and wheat"]
    tasks = ["alpha", None, "prompted"]
    with opened(tiny, host) as deployment:
        prompts = [deployment.tokenizer.encode(text) for text in texts]
        decode = deployment.tokenizer.decode
        wanted = [tiny.greedy(prompt, task, 24) for prompt, task in zip(prompts, tasks, strict=True)]
        for row in (None, 0, 1):
            stops = () if row is None else (decode(wanted[row][3:6]),)
            results = deployment.generate(texts, tasks=tasks, max_new_tokens=24, stop=stops)
            for tokens, result in zip(wanted, results, strict=True):
                ends = [end for end in range(1, 25) if any(stop in decode(tokens[:end]) for stop in stops)]
                assert list(result.token_ids) == tokens[: min(ends, default=24)]
            if row is not None:
                assert 1 <= sum(result.finish_reason == "stop" for result in results) < 3


@pytest.mark.parametrize("swaps", [10, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_swap_records_nothing_anew(llama: Tiny, swaps: int) -> None:
    """Two tasks of one activation, many swaps: the recorded steps of the first are those of the second."""
    backend = HostBackend(PROFILE)
    with opened(llama, backend) as deployment:
        prompt = deployment.tokenizer.encode("oil")
        deployment.add_task(llama.sources / "alpha", "gamma")
        first = {task: deployment.generate(["oil"], tasks=task, max_new_tokens=6)[0] for task in ("alpha", "gamma")}
        queue = max(backend.device.queues, key=lambda queue: queue.records)
        records, replays, executors = queue.records, queue.replays, len(backend.plans.opened)
        assert records > 0
        memory = backend.device.allocated_bytes
        for _ in range(swaps // 2):
            for task, before in first.items():
                assert deployment.generate(["oil"], tasks=task, max_new_tokens=6)[0] == before
        assert (queue.records, len(backend.plans.opened)) == (records, executors)
        assert queue.replays > replays
        assert backend.device.allocated_bytes == memory, "a request allocated memory"
        assert list(first["alpha"].token_ids) == llama.greedy(prompt, "alpha", 6)


def test_base_a_b_a_base_is_bit_for_bit_the_same(llama: Tiny, host: HostBackend) -> None:
    ids = np.array([PROMPTS[0]])
    with opened(llama, host) as deployment:
        tour = [None, "alpha", "beta", "alpha", None]
        outputs = [deployment.run(input_ids=ids, tasks=task)["logits"].tobytes() for task in tour]
    assert outputs[0] == outputs[4]
    assert outputs[1] == outputs[3]
    assert len(set(outputs)) == 3


def test_encoder_agrees_with_pytorch(bert: Tiny) -> None:
    import torch

    profile = Profile(batch=ShapeRange(1, 2, 2), seq=ShapeRange(1, 4, 12), past=None)
    ids, mask = padded(PROMPTS, left=False)
    tasks = ["alpha", None, "beta"]
    with opened(bert, HostBackend(profile)) as deployment:
        states = deployment.run(input_ids=ids, attention_mask=mask, tasks=tasks)["last_hidden_state"]
    for row, (tokens, task) in enumerate(zip(PROMPTS, tasks, strict=True)):
        with torch.no_grad():
            expected = bert.model(inputs_embeds=bert.embeds(tokens, task)).last_hidden_state[0].numpy()
        np.testing.assert_allclose(states[row, : len(tokens)], expected, **CLOSE)


def test_float16_logits_and_embeddings(tmp_path: Path, host: HostBackend) -> None:
    tiny = build("llama", tmp_path / "wide")
    export_base(tiny.model, tmp_path / "half", dtype="float16", target="portable")
    manifest = read_manifest(tmp_path / "half")
    with Deployment(tmp_path / "half", manifest, host, OpenOptions("portable")) as deployment:
        deployment.add_task(tiny.sources / "alpha", "alpha")
        assert deployment.input_embeddings([PROMPTS[0]], tasks="alpha").dtype == np.float16
        for task in (None, "alpha"):
            logits = deployment.run(input_ids=[PROMPTS[0]], tasks=task)["logits"][0]
            assert logits.dtype == np.float16
            np.testing.assert_allclose(logits, tiny.logits(PROMPTS[0], task), rtol=2e-2, atol=3e-2)


def test_embeddings_of_two_modalities(llama: Tiny, host: HostBackend) -> None:
    import torch

    rng = np.random.default_rng(3)
    embeds = rng.normal(size=(2, 9, 48)).astype(np.float32)
    modality = np.array([[0, 1, 1, -1, 0, 0, 1, 0, -1], [1, 1, 0, 0, 0, -1, 1, 1, 0]])
    with opened(llama, host) as deployment:
        adapted = deployment.input_embeddings(inputs_embeds=embeds, modality=modality, tasks=["double", None])
        plain = deployment.input_embeddings(inputs_embeds=embeds, modality=modality)
        by_ids = deployment.input_embeddings([PROMPTS[0]], modality=np.array([[0, 1, -1, 0, 1, 0, 0]]), tasks="double")
    assert plain.tobytes() == embeds.tobytes()
    assert adapted[1].tobytes() == embeds[1].tobytes()
    for name, index in (("text", 0), ("image", 1)):
        expected = llama.adapted(torch.tensor(embeds[:1]), "double", name).numpy()[0]
        chosen = modality[0] == index
        np.testing.assert_allclose(adapted[0][chosen], expected[chosen], **CLOSE)
    assert (adapted[0][modality[0] == -1] == embeds[0][modality[0] == -1]).all()
    table = llama.model.get_input_embeddings().weight.detach()[PROMPTS[0]][None]
    text, image = (llama.adapted(table, "double", name).numpy()[0] for name in ("text", "image"))
    np.testing.assert_allclose(by_ids[0][[0, 3, 5, 6]], text[[0, 3, 5, 6]], **CLOSE)
    np.testing.assert_allclose(by_ids[0][[1, 4]], image[[1, 4]], **CLOSE)
    assert (by_ids[0][2] == table[0, 2].numpy()).all()


def test_whole_vocabulary_through_the_front(llama: Tiny, host: HostBackend) -> None:
    """More positions than a pass takes, for every task."""
    ids = np.arange(96)[None]
    with opened(llama, host) as deployment:
        for task in EVERY:
            expected = llama.embeds(ids[0].tolist(), task).numpy()
            np.testing.assert_allclose(deployment.input_embeddings(ids, tasks=task), expected, rtol=2e-6, atol=2e-6)
        assert deployment.input_embeddings(ids).tobytes() == llama.embeds(ids[0].tolist(), None).numpy().tobytes()


def test_memory_is_given_back(llama: Tiny, host: HostBackend) -> None:
    with opened(llama, host) as deployment:
        deployment.generate(["oil", "wheat"], tasks=["alpha", "beta"], max_new_tokens=5)
        deployment.input_embeddings([PROMPTS[0]], tasks="prompted")
        assert host.device.allocated_bytes > 0
    del deployment
    assert host.device.allocated_bytes == 0
    assert all(executor.is_closed for executor in host.plans.opened)


def test_closing_ends_requests_and_frees_all_memory(llama: Tiny, host: HostBackend) -> None:
    """A deployment closed from the middle of a generation: the request fails, and all memory goes."""
    with opened(llama, host) as deployment:
        pieces: list[str] = []

        def close(row: int, text: str) -> None:
            pieces.append(text)
            deployment.close()

        for call in (
            lambda: deployment.generate(["oil"], tasks="alpha", max_new_tokens=50, stream=close),
            lambda: deployment.generate(["oil"], max_new_tokens=2),
            lambda: deployment.input_embeddings([[5]]),
        ):
            with pytest.raises(RequestError, match="closed: open it again"):
                call()
    assert pieces
    assert host.device.allocated_bytes == 0


def test_requests_outside_the_profile_are_refused(llama: Tiny, bert: Tiny) -> None:
    with opened(llama, HostBackend(PROFILE)) as deployment:
        alone = deployment.generate(["a"], max_new_tokens=3)
        assert deployment.generate(["a"] * 4, max_new_tokens=3) == alone * 4, "4 rows, 3 at a time"
        with pytest.raises(RequestError, match=r"attention_mask: 6\d positions.*takes 1 to 56.*--profile past=0:8:6"):
            deployment.generate(["oil"], max_new_tokens=59)
    narrow = Profile(batch=ShapeRange(1, 1, 1), seq=ShapeRange(3, 4, 5), past=None)
    with opened(bert, HostBackend(narrow)) as deployment:
        with pytest.raises(RequestError, match=r"6 positions.*--profile seq=3:4:6"):
            deployment.run(input_ids=[[5] * 6])
        with pytest.raises(RequestError, match=r"2 positions.*--profile seq=2:4:5|2 positions.*seq=2:"):
            deployment.run(input_ids=[[5] * 2])


def test_a_failed_request_leaves_the_engine_usable(llama: Tiny) -> None:
    backend = HostBackend(PROFILE)
    with opened(llama, backend) as deployment:
        good = deployment.generate(["oil"], tasks="alpha", max_new_tokens=4)
        free, backend.device.limit_bytes = backend.device.limit_bytes, backend.device.allocated_bytes
        with pytest.raises(BackendError, match="out of memory"):
            deployment.generate(["oil"], tasks="beta", max_new_tokens=4)  # a stack of another activation
        backend.device.limit_bytes = free
        assert deployment.generate(["oil"], tasks="alpha", max_new_tokens=4) == good
        prompt = deployment.tokenizer.encode("oil")
        found = deployment.generate(["oil"], tasks="beta", max_new_tokens=4)[0]
        assert list(found.token_ids) == llama.greedy(prompt, "beta", 4)


def test_an_engine_that_does_not_fit_says_so(llama: Tiny) -> None:
    backend = HostBackend(PROFILE, limit_bytes=1 << 16)
    with pytest.raises(BackendError, match="out of memory"):
        opened(llama, backend)


def test_a_request_that_finds_no_room_for_a_workspace_leaves_nothing_behind(llama: Tiny) -> None:
    """A second request at a time needs a workspace of its own, which fits at no place where memory may run out."""
    backend = HostBackend(PROFILE)
    with opened(llama, backend) as deployment:
        engine = deployment._runner.engine
        assert isinstance(engine, DeviceEngine)
        first = engine._workspaces.take()
        held, queues = backend.device.allocated_bytes, backend.device.open_queues
        second = passes.EngineWorkspace(engine._context)
        size = backend.device.allocated_bytes - held
        second.close()
        for max_new_tokens in range(0, size, size // 7):
            backend.device.limit_bytes = held + max_new_tokens
            with pytest.raises(BackendError, match="out of memory"):
                engine._workspaces.take()
            assert (backend.device.allocated_bytes, backend.device.open_queues) == (held, queues)
        backend.device.limit_bytes = None
        engine._workspaces.give(first)
        prompt = deployment.tokenizer.encode("oil")
        found = deployment.generate(["oil"], tasks="alpha", max_new_tokens=4)[0]
        assert list(found.token_ids) == llama.greedy(prompt, "alpha", 4)
    assert (backend.device.allocated_bytes, backend.device.open_queues) == (0, 0)


def test_as_many_steps_stay_recorded_as_may(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other numbers of rows and other tasks are other steps; the oldest record goes, and no other."""
    monkeypatch.setattr(passes, "_MOST_STEPS", 4)
    backend = HostBackend(PROFILE)
    with opened(llama, backend) as deployment:
        engine = deployment._runner.engine
        assert isinstance(engine, DeviceEngine)
        kept = []
        for rows in (1, 2, 3):
            for task in (None, "alpha"):
                deployment.generate(["oil"] * rows, tasks=task, max_new_tokens=2)
                with engine._workspaces.lend() as workspace:
                    kept.append(len(workspace._steps))
    assert kept == [1, 2, 3, 4, 4, 4]


def test_the_engine_of_another_base_is_refused(llama: Tiny, bert: Tiny) -> None:
    class Wrong(HostBackend):
        def open_engine(self, graph: Path, base: Base, role: str, table: EmbeddingTable) -> DeviceEngine:
            other = bert.folder / read_manifest(bert.folder).variants["portable"].graph
            self.plans = HostPlans({"engine": str(other)}, self.profile)
            return DeviceEngine(self.device, self.plans, base, table)

    with pytest.raises(GraphError, match="is missing; it was built from another graph"):
        opened(llama, Wrong(PROFILE))


def test_memory_that_is_not_cleared_is_found(llama: Tiny) -> None:
    """A planted fault: what lies behind the tokens of the cache must be numbers, and the device says so by contract."""
    with opened(llama, HostBackend(PROFILE, fresh=0xFF)) as deployment:
        prompt = deployment.tokenizer.encode("the oil price")
        with pytest.raises(BackendError, match="logits for new token 2 hold NaN"):  # the first that reads the cache
            deployment.generate([prompt], max_new_tokens=8)
