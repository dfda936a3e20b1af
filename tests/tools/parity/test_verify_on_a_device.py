"""All levels of parity on an engine whose memory is a device's: main memory here, the kit's own code in front of it."""

import shutil

import helpers.host_device
import numpy as np
import pytest
from helpers.host_device import HostBackend
from helpers.quick import slow_except
from helpers.tiny_deployments import make_deployment
from onnx import helper, numpy_helper

from adalink.export.base.export import export_base
from adalink.runtime import deployment as deployment_module
from adalink.runtime.device import decode_state
from adalink.runtime.device import forward as passes
from adalink.runtime.device import kv_cache as cache
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.label_spec import LabelSet
from adalink.tools.parity import suite

TASKS = {"alpha": {"seed": 1}, "beta": {"seed": 2, "activation": "silu", "scope": "prompt"}}
CACHES = (cache.StaticDeviceCache, cache.DynamicDeviceCache)
PROFILE = Profile(batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 8, 16), past=ShapeRange(0, 16, 63))
ENCODER = Profile(batch=ShapeRange(1, 2, 3), seq=ShapeRange(2, 8, 64), past=None)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    found = {}
    # More labels than a batch has rows.
    said = {**TASKS, "beta": {**TASKS["beta"], "labels": LabelSet(completions=(" a", " b", " c and d", " e", " f"))}}
    for family, tasks in {"llama": said, "bert": TASKS}.items():
        model, folder = make_deployment(tmp_path_factory.mktemp(family), family, tasks)
        export_base(model, folder, target="portable")
        found[family] = (model, folder)
    return found


@pytest.fixture
def outcome(originals, tmp_path, monkeypatch):
    """Verifies a deployment on main memory; the swaps in fresh processes are those of the portable graph."""

    def verified(family, profile, *, in_place=True):
        model, original = originals[family]
        folder = shutil.copytree(original, tmp_path / f"{family}-{in_place}")
        for module in (suite, deployment_module):
            monkeypatch.setattr(
                module, "open_backend", lambda name, threads=None: HostBackend(profile, in_place=in_place)
            )
        report = suite.verify(folder, str(model), {}, suite.VerifyOptions(variant="portable", quick=True))
        return {check.name: check.passed for check in report.checks}

    return verified


@pytest.mark.parametrize("in_place", slow_except([True, False], True), ids=["in-place", "growing"])
def test_a_decoder_passes_every_level(outcome, in_place):
    found = outcome("llama", PROFILE, in_place=in_place)
    assert all(found.values()), {name for name, passed in found.items() if not passed}
    profile_limits = {name.split("/")[1] for name in found if name.startswith("profile/")}
    assert profile_limits == {f"batch={batch},prompt={prompt}" for batch in (1, 3) for prompt in (1, 16, 60)}
    assert {
        "adapter/alpha/bank-vocabulary",
        "task/beta/labels",
        "task/beta/label-answers",
        "mixed/logits",
        "mixed/ends/generation",
        "task/beta/generation",
    } <= found.keys()


def test_an_encoder_passes_every_level(outcome):
    found = outcome("bert", ENCODER)
    assert all(found.values()), {name for name, passed in found.items() if not passed}
    assert {f"profile/batch={batch},seq={seq}/last_hidden_state" for batch in (1, 3) for seq in (2, 64)} <= found.keys()


def failures(found):
    return {name for name, passed in found.items() if not passed}


def test_a_step_that_looks_at_too_little_of_the_cache_shows_at_the_far_corner(outcome, monkeypatch):
    right = decode_state.rounded_total
    monkeypatch.setattr(decode_state, "rounded_total", lambda total, capacity: total - (total > 60))
    assert right(61, 64) == 64
    found = failures(outcome("llama", PROFILE))
    assert {name.split("/")[1] for name in found if name.startswith("profile/")} == {
        "batch=1,prompt=60",
        "batch=3,prompt=60",
    }


def test_a_cache_that_mixes_up_rows_shows_only_in_batches(outcome, monkeypatch):
    right = cache.DynamicDeviceCache.bind

    def shifted(self, executor, rows, added):
        right(self, executor, rows, added)
        if self.length == 16 and rows > 1:  # the last layer's values are read from the keys' place
            executor.bind(self._names[-1][0], self._current[-2], (rows, self._heads, self.length, self._width))

    monkeypatch.setattr(cache.DynamicDeviceCache, "bind", shifted)
    found = failures(outcome("llama", PROFILE, in_place=False))
    assert any(name.startswith("profile/batch=3,prompt=16") for name in found)
    assert not any(name.startswith("profile/batch=1") for name in found)


def test_an_encoder_that_is_wrong_for_its_largest_shape_shows_at_that_corner(outcome, monkeypatch):
    right = passes.EngineWorkspace.prompt

    def wrong(self, wanted):
        states = right(self, wanted)
        if wanted.inputs.shape == (3, 64):
            states[-1] *= 1.001
        return states

    monkeypatch.setattr(passes.EngineWorkspace, "prompt", wrong)
    found = failures(outcome("bert", ENCODER))
    assert found == {"profile/batch=3,seq=64/last_hidden_state", "mixed/last_hidden_state"}


def test_rows_whose_tasks_are_exchanged_are_found(outcome, monkeypatch):
    from adalink.runtime.device.workspace import EmbedderWorkspace

    right = EmbedderWorkspace.write

    def exchanged(self, inputs, reservation):
        right(self, inputs, reservation)
        for index, _ in self._indices:
            rows = index.host(inputs.shape[0])
            rows[:] = rows[::-1].copy()

    monkeypatch.setattr(EmbedderWorkspace, "write", exchanged)
    found = failures(outcome("llama", PROFILE))
    assert "mixed/logits" in found
    assert "task/alpha/logits" not in found


@pytest.mark.parametrize("kind", slow_except(CACHES, cache.StaticDeviceCache), ids=["in-place", "growing"])
def test_a_cache_that_does_not_move_with_its_row_is_found(outcome, monkeypatch, kind):
    monkeypatch.setattr(kind, "move", lambda self, queue, source, target: None)
    found = failures(outcome("llama", PROFILE, in_place=kind is cache.StaticDeviceCache))
    assert {name for name in found if not name.startswith("scheduler/")} == {
        "mixed/ends/decode-logits",
        "mixed/ends/generation",
    }
    assert "scheduler/decode-logits" in found


@pytest.mark.parametrize("source", ["ids", "embeds"])
def test_each_graph_of_a_front_is_swept(outcome, monkeypatch, source):
    """Tasks are applied by one graph for token ids and another for embeddings; a thousandth is added here."""
    right = helpers.host_device.build_embedder_graph

    def altered(name, base):
        graph = right(name, base)
        if name == f"gelu.{source}":
            _spoil_output(graph)
        return graph

    monkeypatch.setattr(helpers.host_device, "build_embedder_graph", altered)
    found = failures(outcome("llama", PROFILE))
    assert {"ids": "adapter/alpha/bank-vocabulary", "embeds": "adapter/alpha/bank-weights"}[source] in found
    assert not {name for name in found if name.startswith("adapter/beta")}


def _spoil_output(model):
    """One thousandth more of every number that an embedder gives."""
    graph = model.graph
    (output,) = (entry.name for entry in graph.output)
    for node in graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
    factor = numpy_helper.from_array(np.float32(1.001), "factor")
    graph.initializer.append(factor)
    graph.node.append(helper.make_node("Mul", ["before", "factor"], [output]))
