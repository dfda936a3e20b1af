"""KV prefixes: what an engine gives behind them is what PyTorch gives with them as its initial cache."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.export import skip_windows_of_old
from helpers.kv_prefixes import TASKS, Prefixed, build_prefixed
from helpers.soft_prompts import padded

from adalink.runtime.deployment import Deployment

NEW = 8
VARIANTS = ("onnxruntime-cpu", "portable")


def rows(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(lengths)
    return [rng.integers(3, 96, length).tolist() for length in lengths]


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma3", "gpt2", "phi3"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prefixed:
    skip_windows_of_old(request.param)
    return build_prefixed(request.param, tmp_path_factory.mktemp(request.param))


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
