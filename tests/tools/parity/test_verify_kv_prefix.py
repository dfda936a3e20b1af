"""`adalink verify` on KV prefixes, and the faults it exists to find, each really planted."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.kv_prefixes import SETTINGS, prefix_adapter
from helpers.quick import slow_except
from helpers.runtime import write_adapter
from helpers.tiny_deployments import make_model_folder
from helpers.tiny_tokenizer import make_tokenizer, with_beginning

from adalink.export.adapter.document import export_prefix
from adalink.export.adapter.export import export_adapters
from adalink.export.base.export import export_base
from adalink.runtime import model_runner
from adalink.runtime.generation.prefix_cache import PrefixKey
from adalink.runtime.ort import dynamic_cache
from adalink.runtime.ort.static_cache import StaticCacheDecodeState
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.tasks import registry
from adalink.tools.parity.suite import VerifyOptions, verify

OWN = ["before", "before-too", "all"]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean")
    model, folder = make_model_folder(root / "tiny", "llama"), root / "deployment"
    with_beginning(make_tokenizer()).save_pretrained(model)
    for target in ("onnxruntime-cpu", "portable"):
        export_base(model, folder, target=target)
    base = read_manifest(folder).base
    made = {name: prefix_adapter(base, seed, **SETTINGS[name]) for seed, name in enumerate(OWN)}
    export_adapters({name: write_adapter(root / name, adapter) for name, adapter in made.items()}, folder)
    export_prefix(folder, "oil prices", "text")
    return model, folder


def outcome(clean, variant="onnxruntime-cpu"):
    model, folder = clean
    report = verify(folder, str(model), {}, VerifyOptions(threads=1, quick=True, variant=variant))
    left_out = [line for line in report.skipped if "another variant" in line]
    assert report.skipped == left_out
    assert len(left_out) == (variant == "portable")
    return {check.name: check.passed for check in report.checks}


def failures(clean, variant="onnxruntime-cpu"):
    return {name for name, passed in outcome(clean, variant).items() if not passed}


@pytest.mark.parametrize("variant", slow_except(["onnxruntime-cpu", "portable"], "onnxruntime-cpu"))
def test_clean_deployment_passes(clean, variant):
    results = outcome(clean, variant)
    assert all(results.values()), {name for name, passed in results.items() if not passed}
    assert {f"adapter/{task}/kv-prefix" for task in OWN} <= set(results)
    assert {f"task/{task}/generation" for task in OWN} <= set(results)
    assert {"mixed/generation", "scheduler/generation", "control/before/logits", "swap/return"} <= set(results)
    is_cached = variant == "onnxruntime-cpu"
    assert ("prefix-cache/generation" in results) == ("task/text/logits" in results) == is_cached


def plant(monkeypatch, change):
    made = registry.kv_prefixes_of
    monkeypatch.setattr(
        registry,
        "kv_prefixes_of",
        lambda *given: [replace(prefix, states=change(prefix.states)) for prefix in made(*given)],
    )


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["keys-and-values", "layer", "number"])
def test_other_states(clean, monkeypatch, fault):
    def change(states):
        if fault == "layer":
            return np.roll(states, 2, axis=0)
        if fault == "keys-and-values":
            return states.reshape(-1, 2, *states.shape[1:])[:, ::-1].reshape(states.shape)
        states = states.copy()
        states[1, 0, 0, 0] = np.nextafter(states[1, 0, 0, 0], np.float32(9))
        return states

    plant(monkeypatch, change)
    found = failures(clean)
    assert {f"adapter/{task}/kv-prefix" for task in OWN} <= found
    assert ("task/before/logits" in found) == (fault != "number"), "a last bit shows at level 1 alone"


@pytest.mark.slow
def test_positions_off_by_one(clean, monkeypatch):
    begin = StaticCacheDecodeState.begin

    def late(self, states):
        begin(self, states)
        if states is not None:  # a hole behind the prefix: its last position again
            self._make_room(1)
            length = states.shape[2]
            self._cache[:, self._alive - 1, :, length] = states[:, :, -1]
            self._lengths[self._alive - 1] += 1
            self._positions[self._alive - 1] += 1

    monkeypatch.setattr(StaticCacheDecodeState, "begin", late)
    assert {"task/before/logits", "task/before/decode-logits", "task/all/logits"} <= failures(clean)


@pytest.mark.slow
def test_positions_that_do_not_count_from_the_prefix(clean, monkeypatch):
    forward = dynamic_cache.DynamicCacheEngine.forward

    def from_the_text(self, feeds, cache):
        positions = feeds["position_ids"]
        if cache is not None and positions.shape[1] > 1:
            feeds = {**feeds, "position_ids": positions - positions[:, :1]}
        return forward(self, feeds, cache)

    monkeypatch.setattr(dynamic_cache.DynamicCacheEngine, "forward", from_the_text)
    assert {"task/before/logits", "task/all/logits"} <= failures(clean, "portable")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["lost", "neighbour"])
def test_a_row_of_a_mixed_batch(clean, monkeypatch, fault):
    states = model_runner._states

    def wrong(kv_prefixes):
        made = states(kv_prefixes)
        if len(set(map(id, kv_prefixes))) == 1:
            return made
        return [None] * len(made) if fault == "lost" else [*made[1:], made[0]]

    monkeypatch.setattr(model_runner, "_states", wrong)
    found = failures(clean)
    assert {"mixed/logits", "mixed/generation"} <= found
    assert not {name for name in found if name.startswith("task/")}


def test_another_tasks_prefix_from_the_prefix_cache(clean, monkeypatch):
    monkeypatch.setattr(
        model_runner, "PrefixKey", lambda base, adapter, scope, kv_prefix="": PrefixKey(base, adapter, scope)
    )
    assert failures(clean) == {"prefix-cache/decode-logits", "prefix-cache/generation"}
