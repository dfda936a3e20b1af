"""An int8 KV cache is compared with PyTorch; each fault of its graph is planted in a deployment that is intact."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
from helpers.export import needs_int8_cache
from helpers.runtime import reseal
from helpers.tiny_deployments import make_deployment
from onnx import helper, numpy_helper

from adalink.export.base.kv_cache import export_kv_cache
from adalink.runtime import Deployment
from adalink.runtime.backends import open_backend
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.checks.kv_cache import check_kv_caches
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.suite import VerifyOptions, verify

pytestmark = needs_int8_cache
GRAPH = "base/onnxruntime-cpu/model.kv-int8.onnx"
TASKS = {"alpha": {"seed": 1}, "asked": {"seed": 2, "soft_tokens": 3}}
ROWS = [[5, 9, 11, 40, 41, 7, 23, 90, 3, 64, 18, 55], [8, 70, 33, 2, 61, 14, 29], [3, 4, 66]]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("kv")
    model, folder = make_deployment(root, "llama", {"alpha": TASKS["alpha"]})
    export_kv_cache(folder)
    return model, folder, Reference(model, read_manifest(folder).base)


def scaled(factor, kind="value"):
    def change(graph):
        for tensor in graph.initializer:
            if tensor.name == f"past_key_values.1.{kind}.scale":
                values = numpy_helper.to_array(tensor) * np.float32(factor)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return change


def exchanged(graph):
    """Keys in the scale of values, and values in that of keys."""
    node = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
    node.input[12], node.input[13] = node.input[13], node.input[12]


def flatter(graph):
    """Softmax of smaller scores."""
    node = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
    kept = [attribute for attribute in node.attribute if attribute.name != "scale"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("scale", 0.2)])


@pytest.mark.parametrize(
    ("fault", "failed"),
    [
        (None, set()),
        (exchanged, {"codes", "logits"}),
        (flatter, {"codes", "logits"}),
        (scaled(0.25), {"clipped"}),
        (scaled(8.0), {"range"}),
    ],
)
def test_faults_of_the_graph(clean, tmp_path, fault, failed):
    _, original, reference = clean
    folder = shutil.copytree(original, tmp_path / "deployment")
    if fault is not None:
        graph = onnx.load(folder / GRAPH, load_external_data=False)
        fault(graph.graph)
        (folder / GRAPH).write_bytes(graph.SerializeToString())
        reseal(folder)
    with Deployment.open(folder) as deployment:
        folders = {"alpha": (folder / deployment.manifest.tasks["alpha"].config).parent}
        checks = check_kv_caches(deployment, reference, folders, ROWS, open_backend("onnxruntime-cpu", 1))
    for what in ("base", "task/alpha"):
        found = {check.name.rpartition("/")[2]: check for check in checks if f"int8/{what}/" in check.name}
        assert set(found) == {"codes", "clipped", "range", "logits"}
        assert {name for name, check in found.items() if not check.passed} >= failed, found
        assert failed or all(check.passed for check in found.values()), found


def test_verify_says_what_it_compared(clean, tmp_path):
    model, folder, _ = clean
    report = verify(folder, str(model), {}, VerifyOptions(threads=1, quick=True))
    names = {check.name for check in report.checks if check.passed}
    assert {f"kv-cache/int8/{what}/logits" for what in ("base", "task/alpha")} <= names
    assert report.passed
