"""The checker checked: each fault is really planted in a deployment whose integrity is intact, and must be found.

The deployment is a tiny llama with two tasks. A clean one passes every check (the control of these controls).
"""

import json
import shutil

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.folds import export_folded
from helpers.runtime import reseal
from helpers.tiny_deployments import make_deployment, seeded_adapter
from onnx import helper, numpy_helper
from safetensors.numpy import load_file, save_file

from adalink.runtime.errors import BackendError
from adalink.runtime.generation.running_batch import RunningBatch
from adalink.runtime.model_runner import ModelRunner
from adalink.runtime.ort.static_cache import StaticCacheDecodeState
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.tasks import adapter_mapping as bank
from adalink.runtime.tasks.registry import TaskRegistry
from adalink.tools.parity.checks import scheduler, swap_worker
from adalink.tools.parity.checks.swap_worker import run_fresh
from adalink.tools.parity.suite import VerifyOptions, verify

SCHEDULER = {"scheduler/decode-logits", "scheduler/generation", "scheduler/failed-rows"}
TASKS = {"alpha": {"seed": 1}, "beta": {"seed": 2, "activation": "silu"}}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return make_deployment(tmp_path_factory.mktemp("clean"), "llama", TASKS)


@pytest.fixture
def deployment(clean, tmp_path):
    """A copy to plant a fault in."""
    model, original = clean
    return model, shutil.copytree(original, tmp_path / "deployment")


def outcome(model, folder):
    report = verify(folder, str(model), {}, VerifyOptions(threads=1, quick=True))
    return {check.name: check.passed for check in report.checks}


def failures(model, folder):
    return {name for name, passed in outcome(model, folder).items() if not passed}


def edit_graph(path, change):
    """Load a graph with its weights inside, change it, and write it as one file."""
    graph = onnx.load(path)
    change(graph)
    data = graph.SerializeToString()
    path.write_bytes(data)


def change_weight(name, index, factor):
    def change(model):
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values[index] *= np.float32(factor)
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return change


def variant_graph(folder):
    (variant,) = read_manifest(folder).variants.values()
    return folder / variant.graph


def test_clean_deployment_passes(deployment):
    results = outcome(*deployment)
    assert all(results.values())
    for level in (
        "adapter/alpha/bank-vocabulary",
        "base/logits",
        "task/beta/generation",
        "swap/return",
        "control/alpha/logits",
    ):
        assert level in results


@pytest.mark.parametrize(
    ("name", "index"),
    [("text.down.weight", (5, 2)), ("text.up.weight", (1, 30)), ("text.down.bias", (3,)), ("text.up.bias", (17,))],
)
def test_one_weight_of_a_task_graph_changed_by_one_percent(deployment, name, index):
    model, folder = deployment
    edit_graph(folder / "tasks/alpha/adapter.onnx", change_weight(name, index, 1.01))
    reseal(folder)
    assert failures(model, folder) == {"adapter/alpha/graph-vocabulary", "adapter/alpha/graph-weights"}


@pytest.mark.parametrize("name", ["verify", "rollback"])
def test_guesses_are_checked_wrongly(deployment, monkeypatch, name):
    """Logits of the first token for the second; a cache that is altered where guesses were taken back."""
    true = getattr(StaticCacheDecodeState, name)

    def verify(self, embeds):
        logits = true(self, embeds)
        logits[1:2] = logits[0]
        return logits

    def rollback(self, count):
        true(self, max(0, count - 1))
        if count:
            self._lengths[0] -= 1
            self._cache[:, 0, :, self._lengths[0] - 1] *= 1.05

    monkeypatch.setattr(StaticCacheDecodeState, name, verify if name == "verify" else rollback)
    found = failures(*deployment)
    assert found
    assert all("/drafts/" in check for check in found)


@pytest.mark.parametrize("fault", ["cache", "task"])
def test_a_row_that_takes_anothers_place_keeps_what_was_there(deployment, monkeypatch, fault):
    """Only rows that end at different times ever change places."""

    def drop(self, row):
        self._alive -= 1
        self._cache[:, row, :, self._lengths[row] :] = 0  # memory that was never written may hold anything
        self._lengths[row], self._positions[row] = self._lengths[self._alive], self._positions[self._alive]

    def in_first_order(self):
        rows = sorted(self.rows, key=lambda row: row.options.label)
        return self._embedder.for_decoding(bank.combine([row.generated_tasks for row in rows]))

    if fault == "cache":
        monkeypatch.setattr(StaticCacheDecodeState, "drop", drop)
    else:
        monkeypatch.setattr(RunningBatch, "_mapping", in_first_order)
    found = failures(*deployment)
    assert found - SCHEDULER == {"mixed/ends/decode-logits", "mixed/ends/generation"}
    assert found & SCHEDULER


@pytest.mark.parametrize("fault", ["place", "length", "logits"])
def test_a_row_that_joins_a_running_batch_is_taken_wrongly(deployment, monkeypatch, fault):
    """Only there does a row change from the state that read its prompt into another."""
    adopt = StaticCacheDecodeState.adopt

    def planted(self, state):
        if fault == "length":
            state._lengths[0] -= 1
        adopt(self, state)
        if fault == "place":
            self._cache[:, self._alive - 1] = self._cache[:, 0]
        elif fault == "logits":
            self.logits[-1] = self.logits[0]

    monkeypatch.setattr(StaticCacheDecodeState, "adopt", planted)
    found = failures(*deployment)
    assert found
    assert found <= SCHEDULER


@pytest.mark.parametrize("fails_at", [3, 17])
def test_a_running_batch_that_fails_is_a_failed_check(deployment, monkeypatch, fails_at):
    """Of the row that others join, and later: no error of ``verify`` itself."""
    calls = []

    def fail(scores, sequence):
        calls.append(sequence)
        if len(calls) >= fails_at:
            raise BackendError("the engine refused")

    record = scheduler.Recorder.__call__
    monkeypatch.setattr(scheduler.Recorder, "__call__", lambda self, *given: (record(self, *given), fail(*given))[0])
    assert "scheduler/failed-rows" in failures(*deployment)


def test_two_tasks_swapped(deployment):
    """Each graph computes the other task, under its own metadata; the runtime runs the bank and is not concerned."""
    model, folder = deployment
    paths = [folder / f"tasks/{name}/adapter.onnx" for name in ("alpha", "beta")]
    graphs = [onnx.load(path) for path in paths]
    properties = [{entry.key: entry.value for entry in graph.metadata_props} for graph in graphs]
    for path, graph, metadata in zip(paths, reversed(graphs), properties, strict=True):
        del graph.metadata_props[:]
        helper.set_model_props(graph, metadata)
        path.write_bytes(graph.SerializeToString())
    reseal(folder)
    assert failures(model, folder) == {
        f"adapter/{task}/graph-{sweep}" for task in ("alpha", "beta") for sweep in ("vocabulary", "weights")
    }


def test_bank_graph_of_another_activation(deployment):
    model, folder = deployment
    paths = read_manifest(folder).base.bank
    shutil.copyfile(folder / paths["gelu_tanh_bias"], folder / paths["gelu_bias"])
    reseal(folder)
    found = failures(model, folder)
    assert {"adapter/alpha/bank-vocabulary", "adapter/alpha/bank-weights", "task/alpha/logits"} <= found
    assert not {name for name in found if "beta" in name or "graph" in name}


def test_bank_fed_with_another_tasks_weights(deployment, monkeypatch):
    """The runtime hands out the weights of beta to whoever asks for alpha."""
    model, folder = deployment
    get = TaskRegistry.get
    monkeypatch.setattr(TaskRegistry, "get", lambda self, name: get(self, "beta"))
    found = failures(model, folder)
    assert {"adapter/alpha/bank-vocabulary", "task/alpha/logits", "task/alpha/top1", "task/alpha/kl"} <= found
    assert not {name for name in found if "beta" in name or "graph" in name}


@pytest.mark.parametrize("fold", ["table", "rank"])
def test_one_token_of_a_folded_task(fold, clean, tmp_path):
    """One component of one token, by one percent of the largest: no prompt need hold that token."""
    model, _ = clean
    folder = shutil.copytree(clean[1], tmp_path / "deployment")
    source = tmp_path / "folded"
    shutil.copytree(folder / "tasks/alpha", source)
    task = export_folded(source, folder, "folded", fold)
    assert not failures(model, folder)
    path = folder / task.fold.path
    ((name, values),) = load_file(path).items()
    values = values.copy()
    values[91, 1] += 0.01 * np.abs(values).max()
    save_file({name: values}, path)
    reseal(folder)
    assert failures(model, folder) == {"adapter/folded/fold-vocabulary"}


def stack_wrongly(monkeypatch, change):
    """Whenever rows of several tasks are stacked, ``change`` spoils the stacked weights."""
    stack = bank._stack

    def wrong(parts):
        part = stack(parts)
        change(part.weights)
        return part

    monkeypatch.setattr(bank, "_stack", wrong)


def test_rows_of_the_stacked_bank_exchanged(tmp_path, monkeypatch):
    """Two tasks of one kind in one batch: each generates with the other's weights."""
    model, folder = make_deployment(tmp_path / "root", "llama", {"alpha": {"seed": 1}, "beta": {"seed": 2}})
    assert not failures(model, folder)

    def exchange(weights):
        for name, weight in weights.items():
            weights[name] = weight[::-1].copy()

    stack_wrongly(monkeypatch, exchange)
    found = failures(model, folder)
    assert {"mixed/decode-logits", "mixed/generation"} <= found
    assert all(name.startswith(("mixed/", "scheduler/")) for name in found)


def test_padding_of_a_smaller_rank_that_is_not_zero(tmp_path, monkeypatch):
    """Where alpha's rank ends, the stacked weights hold a little of something, as memory that was not cleared would."""
    tasks = {"alpha": {"seed": 1, "rank": 2}, "beta": {"seed": 2, "rank": 4}}
    model, folder = make_deployment(tmp_path / "root", "llama", tasks)
    assert not failures(model, folder)

    def fill(weights):
        padded = (weights["down"] == 0).all(axis=2)
        assert padded.any()
        weights["down"][padded] = 0.01
        weights["up"].swapaxes(1, 2)[padded] = 0.01

    stack_wrongly(monkeypatch, fill)
    assert failures(model, folder) - SCHEDULER == {"mixed/decode-logits", "mixed/ends/decode-logits"}


def test_adapter_applied_only_to_the_prompt(deployment, monkeypatch):
    """The runtime forgets the tasks of generated tokens."""
    model, folder = deployment
    monkeypatch.setattr(bank.AdapterMapping, "for_decoding", lambda self: bank.NO_ADAPTER)
    found = failures(model, folder)
    assert {"task/alpha/decode-logits", "mixed/decode-logits"} <= found
    assert "task/alpha/logits" not in found  # whole sequences cannot show it; decoding must


def test_adapter_applied_to_generated_tokens_too(tmp_path, monkeypatch):
    """The reverse: trained for the prompt alone, run for every position."""
    model, folder = make_deployment(tmp_path / "root", "llama", {"alpha": {"seed": 1, "scope": "prompt"}})
    monkeypatch.setattr(bank.AdapterMapping, "for_decoding", lambda self: self)
    assert "task/alpha/decode-logits" in failures(model, folder)


def test_manifest_that_says_another_scope_than_the_adapter(deployment):
    model, folder = deployment
    tasks = dict(read_manifest(folder).tasks)
    tasks["alpha"] = msgspec.structs.replace(tasks["alpha"], scope="prompt")
    reseal(folder, tasks=tasks)
    assert failures(model, folder) == {"adapter/alpha/contract"}


def test_wrong_positions(deployment):
    """The base graph doubles its positions; a constant shift would be invisible to rotary embeddings."""
    model, folder = deployment

    def double(graph):
        for tensor in graph.graph.initializer:
            if tensor.name in ("cos_all", "sin_all"):
                values = numpy_helper.to_array(tensor)
                doubled = np.minimum(2 * np.arange(len(values)), len(values) - 1)
                tensor.CopyFrom(numpy_helper.from_array(values[doubled], tensor.name))

    edit_graph(variant_graph(folder), double)
    reseal(folder)
    assert {"base/logits", "base/kl", "base/generation", "task/alpha/logits"} <= failures(model, folder)


def feed_inputs_embeds(graph, nodes):
    """Put nodes between the graph's input and its users; the last one makes ``inputs_embeds_changed``."""
    for node in graph.graph.node:
        for index, name in enumerate(node.input):
            if name == "inputs_embeds":
                node.input[index] = "inputs_embeds_changed"
    for node in reversed(nodes):
        graph.graph.node.insert(0, node)


def test_rows_of_a_batch_leak_into_each_other(deployment):
    """x + (mean over the batch - x) / 100: the identity for a single row, so only the mixed batch can tell."""
    model, folder = deployment

    def leak(graph):
        values = {"zero": np.array([0], np.int64), "hundredth": np.array(0.01, np.float32)}
        graph.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
        nodes = [
            helper.make_node("ReduceMean", ["inputs_embeds", "zero"], ["mean"], keepdims=1),
            helper.make_node("Sub", ["mean", "inputs_embeds"], ["difference"]),
            helper.make_node("Mul", ["difference", "hundredth"], ["leak"]),
            helper.make_node("Add", ["inputs_embeds", "leak"], ["inputs_embeds_changed"]),
        ]
        feed_inputs_embeds(graph, nodes)

    edit_graph(variant_graph(folder), leak)
    reseal(folder)
    found = failures(model, folder)
    assert {"mixed/logits", "mixed/decode-logits"} <= found
    assert "base/logits" not in found


def test_engine_that_is_not_repeatable(deployment):
    """Noise far below every numerical limit: only bit-exactness can tell."""
    model, folder = deployment

    def add_noise(graph):
        graph.graph.initializer.append(numpy_helper.from_array(np.array(1e-7, np.float32), "tiny"))
        nodes = [
            helper.make_node("RandomNormalLike", ["inputs_embeds"], ["random"], dtype=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["random", "tiny"], ["noise"]),
            helper.make_node("Add", ["inputs_embeds", "noise"], ["inputs_embeds_changed"]),
        ]
        feed_inputs_embeds(graph, nodes)

    edit_graph(variant_graph(folder), add_noise)
    reseal(folder)
    assert {"swap/return", "swap/fresh-process"} == failures(model, folder)


def test_engine_rebuilt_or_base_changed_during_swaps(deployment, monkeypatch):
    """What a fresh process reports reaches the receipt's checks."""
    model, folder = deployment

    def run_fresh_and_rebuild(request):
        answer = run_fresh(request)
        return {**answer, "builds": 1, "builder_calls": 1, "unchanged": False}

    monkeypatch.setattr("adalink.tools.parity.checks.swap.run_fresh", run_fresh_and_rebuild)
    assert failures(model, folder) == {"receipt/engine-builds", "receipt/builder-calls", "receipt/base-files"}


def test_an_engine_opened_during_a_swap_is_counted(deployment, monkeypatch):
    """Whoever opens it: here the runtime does, and does not say so."""
    _, folder = deployment
    (variant,) = read_manifest(folder).variants
    request = {"path": folder, "backend": "onnxruntime-cpu", "variant": variant, "threads": 1, "ids": [[5, 6, 7]]}
    request |= {"decoder_ids": None, "tasks": [None, "alpha", "beta", None]}
    assert swap_worker._answer(request)["builds"] == 0
    run = ModelRunner.run

    def rebuilding(self, given, *rest):
        if given.tasks is not bank.NO_ADAPTER:
            onnxruntime.InferenceSession(str(variant_graph(folder)))
        return run(self, given, *rest)

    monkeypatch.setattr(ModelRunner, "run", rebuilding)
    assert swap_worker._answer(request)["builds"] == 2


def test_tokenizer_altered(deployment):
    """Two letters change places in the deployment's tokenizer."""
    model, folder = deployment
    path = folder / "base/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    path.write_text(json.dumps(content))
    reseal(folder)
    assert "base/tokenizer" in failures(model, folder)


def test_one_base_weight_altered(deployment):
    """One number of one matrix in the middle of the network, by one percent."""
    model, folder = deployment

    def nudge(graph):
        tensor = next(tensor for tensor in graph.graph.initializer if list(tensor.dims) == [48, 2 * 80])
        values = numpy_helper.to_array(tensor).copy()
        index = np.unravel_index(np.abs(values).argmax(), values.shape)
        values[index] *= np.float32(1.01)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    edit_graph(variant_graph(folder), nudge)
    reseal(folder)
    assert "base/logits" in failures(model, folder)


def test_embedding_table_altered(deployment):
    """One number of the table, in its last bit."""
    model, folder = deployment
    base = read_manifest(folder).base
    path = folder / base.embeddings
    data = bytearray(path.read_bytes())
    data[base.table.rows_start + 4] ^= 1
    path.write_bytes(bytes(data))
    reseal(folder)
    assert "base/embeddings" in failures(model, folder)


def test_task_that_does_nothing(tmp_path):
    """An adapter with up = 0 is deployed correctly and is useless: only the negative control can tell."""
    model, folder = make_deployment(tmp_path / "root", "llama", {"idle": {"seed": 1, "bias": False, "up_scale": 0.0}})
    assert failures(model, folder) == {"control/idle/logits"}


def test_another_adapter_than_the_one_deployed(deployment, tmp_path):
    from helpers.tiny_deployments import write_adapter

    model, folder = deployment
    other = write_adapter(tmp_path / "other", seeded_adapter(model, seed=77))
    report = verify(folder, str(model), {"alpha": other}, VerifyOptions(threads=1, quick=True))
    found = {check.name for check in report.checks if not check.passed}
    assert {"adapter/alpha/contract", "adapter/alpha/bank-vocabulary", "task/alpha/logits"} <= found
