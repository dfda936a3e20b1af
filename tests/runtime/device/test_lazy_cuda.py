"""The kit's CUDA device on a lazy stand-in for the runtime: whole engines, recorded steps, and each missing wait."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.host_device import HAS_TENSOR_SCATTER
from helpers.lazy_cuda import LazyCuda, LazyPlans, lazy_device
from helpers.runtime import Tiny, build

from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from adalink.runtime.device.cuda import CudaQueue
from adalink.runtime.errors import BackendError
from adalink.runtime.options import OpenOptions
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest
from benchmarks.gpu_proof.measure.front import FrontBackend
from benchmarks.gpu_proof.steps.device_engine import try_memory, try_recording

PROFILE = Profile(batch=ShapeRange(1, 2, 4), seq=ShapeRange(1, 4, 8), past=ShapeRange(0, 16, 62))
PROMPTS = [[5, 9, 33, 41, 7, 60, 12, 44, 81, 19], [8, 70, 3], [90, 4, 77, 21, 15]]
TASKS = ["alpha", None, "beta"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = build("llama", tmp_path_factory.mktemp("lazy"))
    export_base(tiny.model, tiny.folder, target="portable")
    return tiny


def open_on(cuda: LazyCuda, tiny: Tiny, *, in_place: bool) -> Deployment:
    if in_place and not HAS_TENSOR_SCATTER:
        pytest.skip("this ONNX Runtime has no TensorScatter; 1.24 has")
    backend = FrontBackend(
        lazy_device(cuda), lambda graphs, profile: LazyPlans(cuda, graphs, profile), PROFILE, in_place=in_place
    )
    return Deployment(tiny.folder, read_manifest(tiny.folder), backend, OpenOptions("portable"))


@pytest.mark.parametrize("in_place", [True, False])
def test_logits_and_steps_agree_with_pytorch(in_place: bool, tiny: Tiny) -> None:
    cuda = LazyCuda()
    with open_on(cuda, tiny, in_place=in_place) as deployment:
        for task in (None, "alpha", "beta"):
            for tokens in PROMPTS:
                logits = deployment.run(input_ids=[tokens], tasks=task)["logits"][0]
                np.testing.assert_allclose(logits, tiny.logits(tokens, task), **CLOSE)
        results = deployment.generate(PROMPTS, tasks=TASKS, max_new_tokens=20)
        for prompt, task, result in zip(PROMPTS, TASKS, results, strict=True):
            tokens = [*prompt, *result.token_ids]
            logits = tiny.logits(tokens, task)
            for place in range(len(prompt) - 1, len(tokens) - 1):
                assert logits[place].max() - logits[place][tokens[place + 1]] <= 1e-3
    assert (cuda.launches > 10) == in_place
    assert cuda.captures == {}


def test_switching_tasks_records_no_step_anew(tiny: Tiny) -> None:
    cuda = LazyCuda()
    with open_on(cuda, tiny, in_place=True) as deployment:
        records = []
        for task in ["alpha", "beta", "alpha", "beta", "alpha"]:
            deployment.generate([PROMPTS[1]], tasks=task, max_new_tokens=4)
            records.append(cuda.records)
    assert records[1:] == records[1:2] * 4


def test_memory_and_recordings_of_the_proof_hold() -> None:
    cuda = LazyCuda()
    device = lazy_device(cuda)
    assert try_memory(device) == {"new_is_zero": True, "comes_back": True}
    found = try_recording(device)
    assert found["replays_right"] == 3


@pytest.mark.parametrize("which", ["every queue", "the weights' queue"])
def test_a_device_without_waits_is_caught(which: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: queues that are never waited for. On memory that copies at once it would go unseen."""
    cuda = LazyCuda()
    with open_on(cuda, tiny, in_place=True) as deployment:
        weights, right = deployment._runner.engine._context.adapter_pools._queue.handle, CudaQueue.wait

        def wait(self: CudaQueue) -> None:
            if which != "every queue" and self.handle != weights:
                right(self)

        assert answers_rightly(deployment, tiny)
        deployment.unload_task("alpha")
        deployment._runner.engine._context.adapter_pools._pools.clear()
        monkeypatch.setattr(CudaQueue, "wait", wait)
        assert not answers_rightly(deployment, tiny)
        monkeypatch.undo()


def answers_rightly(deployment: Deployment, tiny: Tiny) -> bool:
    """Whether a task's logits are PyTorch's; logits that are all equal, which the kit refuses, are not."""
    try:
        logits = deployment.run(input_ids=[PROMPTS[0]], tasks="alpha")["logits"][0]
    except BackendError:
        return False
    return np.allclose(logits, tiny.logits(PROMPTS[0], "alpha"), **CLOSE)


def test_what_cannot_be_captured_runs_directly(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: an engine that waits inside a step, as ONNX Runtime does by default. The answers stay the same."""
    cuda = LazyCuda()
    with open_on(cuda, tiny, in_place=True) as deployment:
        expected = deployment.generate(PROMPTS, tasks=TASKS, max_new_tokens=8)
    waiting = LazyCuda()
    right = LazyPlans.executor

    def executor(self, name, profile, arena):  # type: ignore[no-untyped-def]
        made = right(self, name, profile, arena)
        enqueue = made.enqueue

        def wait_first() -> None:
            arena.queue.wait()
            enqueue()

        made.enqueue = wait_first
        return made

    monkeypatch.setattr(LazyPlans, "executor", executor)
    with open_on(waiting, tiny, in_place=True) as deployment:
        assert deployment.generate(PROMPTS, tasks=TASKS, max_new_tokens=8) == expected
    assert waiting.launches == 0
    assert waiting.captures == {}


def test_a_full_device_says_so_and_closing_gives_all_back(tiny: Tiny) -> None:
    with pytest.raises(BackendError, match=r"the GPU's memory is full: [\d.]+ MB asked for"):
        open_on(LazyCuda(limit_bytes=1 << 16), tiny, in_place=True)
    cuda = LazyCuda()
    with open_on(cuda, tiny, in_place=True) as deployment:
        deployment.generate(PROMPTS, tasks=TASKS, max_new_tokens=8)
        assert cuda.blocks
    assert cuda.blocks == {}


def test_threads_at_a_time_answer_as_one_by_one(tiny: Tiny) -> None:
    from concurrent.futures import ThreadPoolExecutor

    cuda = LazyCuda()
    asked = [(prompt, task) for prompt in PROMPTS for task in TASKS]
    with open_on(cuda, tiny, in_place=True) as deployment, ThreadPoolExecutor(4) as pool:

        def answer(pair: tuple[list[int], str | None]) -> tuple[int, ...]:
            return deployment.generate([pair[0]], tasks=pair[1], max_new_tokens=6)[0].token_ids

        assert list(pool.map(answer, asked)) == [answer(pair) for pair in asked]
