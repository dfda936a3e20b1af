"""``adalink doctor``: which backends work on this machine, tried for real, and what to install for the others."""

from __future__ import annotations

import json
from typing import Any

import click

# Backend or job -> the extra that brings it.
BACKEND_EXTRAS = {
    "onnxruntime-cpu": "cpu",
    "onnxruntime-cuda": "gpu",
    "onnxruntime-tensorrt": "gpu,tensorrt",
    "onnxruntime-tensorrt-rtx": "cpu,tensorrt-rtx-provider",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
}
JOB_PACKAGES = {
    "train": ("torch", "transformers", "accelerate", "gguf"),
    "export": ("torch", "transformers", "onnx", "optimum"),
    "engine": ("onnx",),
}


def diagnose() -> dict[str, object]:
    """Try every backend, each in its own process, and look for the packages of training and export."""
    from adalink.tools.common.environment import describe_environment, package_versions
    from adalink.tools.doctor.probe import probe, probe_gpus

    backends = {name: {**probe(name)._asdict(), "install": _install(extra)} for name, extra in BACKEND_EXTRAS.items()}
    jobs = {}
    for name, packages in JOB_PACKAGES.items():
        missing = sorted(set(packages) - package_versions(packages).keys())
        detail = f"missing: {', '.join(missing)}" if missing else "all packages are installed"
        jobs[name] = {"works": not missing, "detail": detail, "advice": "", "install": _install(name)}
    return {"backends": backends, "jobs": jobs, "gpus": probe_gpus(), "environment": describe_environment()}


def _install(extra: str) -> str:
    """The pip command for an extra; the two onnxruntime packages share a name, so one must go first."""
    from adalink.tools.common.environment import package_versions

    rival = {"gpu": "onnxruntime", "cpu": "onnxruntime-gpu"}.get(extra.partition(",")[0])
    prefix = f"pip uninstall -y {rival} && " if rival and package_versions((rival,)) else ""
    return f"{prefix}pip install 'adalink-kit[{extra}]'"


@click.command(short_help="Say which backends work on this machine.")
@click.option("--footprint", is_flag=True, help="List what the runtime and its packages weigh instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(footprint: bool, as_json: bool) -> None:
    """Say which backends work on this machine.

    Each backend is tried for real, in a process of its own: import, providers, and a graph of one node, which
    TensorRT also builds an engine of. For the others the line says what to do. onnxruntime and onnxruntime-gpu share
    one import name: install one of them. The footprint is the installed size of the kit and of what it needs to run
    a deployment, without any model; the packages of training and export are left out.

    \b
    Example:
      adalink doctor
      adalink doctor --json
      adalink doctor --footprint
    """  # noqa: D301
    if footprint:
        _show_footprint(as_json)
        return
    findings = diagnose()
    if as_json:
        click.echo(json.dumps(findings, indent=2))
        return
    from adalink.tools.common.console import print_table

    rows = []
    for part in ("backends", "jobs"):
        entries = findings[part]
        assert isinstance(entries, dict)
        for name, entry in entries.items():
            rows.append((name, "works" if entry["works"] else "no", entry["detail"], _advice(entry)))
    print_table("Backends and jobs", ("name", "state", "what was seen", "what to do"), rows)
    environment = findings["environment"]
    assert isinstance(environment, dict)
    packages = ", ".join(f"{name} {version}" for name, version in environment.pop("packages").items())
    gpus = findings["gpus"]
    assert isinstance(gpus, dict)
    print_table("This machine", ("", ""), [*environment.items(), ("packages", packages), *_gpu_rows(gpus)])


def _show_footprint(as_json: bool) -> None:
    from adalink.tools.common.console import print_table
    from adalink.tools.doctor.footprint import measure_footprint

    packages = measure_footprint()
    total = sum(int(str(entry["bytes"])) for entry in packages)
    if as_json:
        click.echo(json.dumps({"packages": packages, "total_bytes": total}, indent=2))
        return
    rows = [(entry["package"], entry["version"], f"{int(str(entry['bytes'])) / 1e6:.1f}") for entry in packages]
    print_table("Footprint of the runtime", ("package", "version", "MB"), [*rows, ("total", "", f"{total / 1e6:.1f}")])


def _gpu_rows(gpus: dict[str, Any]) -> list[tuple[str, str]]:
    if not gpus["devices"]:
        return [("gpus", f"none: {gpus['reason']}")]
    rows = [
        (f"gpu {number}", f"{gpu['name']}, {gpu['capability']}, {gpu['memory_bytes'] / 1e9:.0f} GB")
        for number, gpu in enumerate(gpus["devices"])
    ]
    return [("driver", f"serves CUDA {gpus['driver']}"), *rows]


def _advice(entry: dict[str, object]) -> object:
    return "" if entry["works"] else entry["advice"] or entry["install"]
