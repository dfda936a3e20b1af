"""The sessions behind the device front end, on ONNX Runtime's CPU provider: the lines that a GPU will run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from helpers.host_device import HostDevice
from helpers.runtime import build

from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from adalink.runtime.device.protocols import DeviceArena
from adalink.runtime.errors import BackendError
from adalink.runtime.options import OpenOptions
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest
from benchmarks.gpu_proof.measure.front import CudaPlans, FrontBackend, Graphs

PROFILE = Profile(batch=ShapeRange(1, 2, 4), seq=ShapeRange(1, 4, 8), past=ShapeRange(0, 16, 62))
CPU = {"provider": "CPUExecutionProvider", "place": "cpu"}
PROMPTS = [[5, 9, 33, 41, 7, 60], [8, 70, 3]]


@pytest.mark.parametrize("shares_stream", [False, True])
def test_engines_compute_as_pytorch(shares_stream: bool, tmp_path: Path) -> None:
    """Without recording, which main memory cannot do with sessions that know no queue: the growing cache."""
    tiny = build("llama", tmp_path)
    export_base(tiny.model, tiny.folder, target="portable")
    opened: list[CudaPlans] = []

    def make_plans(graphs: Graphs, profile: Profile) -> CudaPlans:
        opened.append(CudaPlans(graphs, profile, shares_stream=shares_stream, **CPU))
        return opened[-1]

    backend = FrontBackend(HostDevice(), make_plans, PROFILE, in_place=False)
    manifest = read_manifest(tiny.folder)
    with Deployment(tiny.folder, manifest, backend, OpenOptions("portable")) as deployment:
        for task in (None, "alpha", "beta"):
            for tokens in PROMPTS:
                logits = deployment.run(input_ids=[tokens], tasks=task)["logits"][0]
                np.testing.assert_allclose(logits, tiny.logits(tokens, task), rtol=1e-4, atol=1e-4)
        together = deployment.generate(PROMPTS, tasks=["alpha", None], max_new_tokens=6)
        for row, task in enumerate(("alpha", None)):
            assert together[row] == deployment.generate([PROMPTS[row]], tasks=task, max_new_tokens=6)[0]
    assert len(opened) == 1


def test_a_session_that_fell_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime falls back to the CPU without an error: figures of it would be taken for the GPU's."""
    tiny = build("llama", tmp_path)
    export_base(tiny.model, tiny.folder, target="portable")
    graph = tiny.folder / read_manifest(tiny.folder).variants["portable"].graph
    plans = CudaPlans({"engine": str(graph)}, PROFILE, shares_stream=False)
    right = ort.InferenceSession
    monkeypatch.setattr(ort, "InferenceSession", lambda model, options, providers: right(model, options))
    with pytest.raises(BackendError, match="engine: ONNX Runtime fell back to"):
        plans.executor("engine", 0, DeviceArena(HostDevice()))
