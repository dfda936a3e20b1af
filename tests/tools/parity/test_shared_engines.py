"""One engine a graph, which no deployment closes for the others."""

import pytest
from helpers.tiny_deployments import make_deployment

from adalink.export.base.export import export_base
from adalink.runtime.backends import open_backend
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import AdaLinkError
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity import quantized_levels, suite
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


def test_a_quantised_variant_is_verified_with_one_engine_at_a_time(tmp_path, monkeypatch):
    """That without rounding, and the one as deployed: each holds the weights."""
    model, folder = make_deployment(tmp_path, "llama", {})
    export_base(model, folder, quantization="int4")
    open_now, most = set(), []

    class Counted(SharedEngines):
        def open_engine(self, *graph):
            open_now.add(id(self))
            most.append(len(open_now))
            return super().open_engine(*graph)

        def close(self):
            open_now.discard(id(self))
            super().close()

    for module in (suite, quantized_levels):
        monkeypatch.setattr(module, "SharedEngines", Counted)
    report = suite.verify(folder, str(model), {}, suite.VerifyOptions(variant="int4", threads=1, quick=True))
    assert report.passed
    assert (max(most), open_now) == (1, set())
