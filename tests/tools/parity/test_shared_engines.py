"""One engine a graph, which no deployment closes for the others."""

import pytest
from helpers.tiny_deployments import make_deployment

from adalink.runtime.backends import open_backend
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import AdaLinkError
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.engines.shared_engines import SharedEngines


def test_deployments_share_an_engine_until_it_is_closed(tmp_path):
    _, folder = make_deployment(tmp_path, "llama", {})
    opened = []
    inner = open_backend("onnxruntime-cpu", 1)
    open_engine = inner.open_engine
    inner.open_engine = lambda *graph: opened.append(graph) or open_engine(*graph)
    manifest = read_manifest(folder)
    with SharedEngines(inner) as engines:
        first, second = (Deployment(folder, manifest, engines) for _ in range(2))
        first.close()
        assert second.run(input_ids=[[5, 6]])["logits"].shape == (1, 2, 96)
        assert len(opened) == 1
    with pytest.raises(AdaLinkError):
        second.run(input_ids=[[5, 6]])
    second.close()
