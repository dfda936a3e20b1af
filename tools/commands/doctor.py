"""``adalink doctor``: which backends work on this machine, tried for real, and what to install for the others."""

from __future__ import annotations

from typing import Any

import click

from adalink.runtime.extras import install_command
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.verb import Verb
from adalink.tools.terminal.terminal_text import echo

# Backend or job -> the extra that brings it.
BACKEND_EXTRAS = {
    "onnxruntime-cpu": "cpu",
    "onnxruntime-cuda": "gpu",
    "onnxruntime-tensorrt": "gpu,tensorrt",
    "onnxruntime-tensorrt-rtx": "cpu,tensorrt-rtx-provider",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
    "llama.cpp": "llama-cpp",
}
JOB_PACKAGES = {
    "train": ("torch", "transformers", "accelerate", "gguf"),
    "export": ("torch", "transformers", "onnx", "optimum"),
    "engine": ("onnx",),
}


# Of lines below a name.
_MARGIN = 7


def diagnose() -> dict[str, Any]:
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
    return f"{prefix}{install_command(extra)}"


@click.command(cls=Verb, short_help="Say which backends work on this machine.")
@click.option("--footprint", is_flag=True, help="List what the runtime and its packages weigh instead.")
@json_options("Print the findings as JSON.")
def command(footprint: bool, output: JsonOutput) -> None:
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
        _show_footprint(output)
        return
    findings = diagnose()
    output.give(findings, lambda: _show_findings(findings))


def _show_findings(findings: dict[str, Any]) -> None:
    """A list of backends and jobs; what to do about one that does not work is a line of its own, to be copied."""
    from adalink.tools.terminal.console import print_fields, print_marked, print_wrapped

    for part in ("backends", "jobs"):
        echo(part)
        for name, entry in findings[part].items():
            print_marked("works" if entry["works"] else "no", f"{'' if entry['works'] else '   '}  {name}")
            print_wrapped(entry["detail"], indent=_MARGIN)
            if not entry["works"] and entry["advice"]:
                print_wrapped(f"to do: {entry['advice']}", indent=_MARGIN)
            elif not entry["works"]:
                echo(f"{' ' * _MARGIN}{entry['install']}")
    environment = findings["environment"]
    packages = [f"{name} {version}" for name, version in environment["packages"].items()]
    echo("this machine")
    print_fields({**environment, "packages": packages, **dict(_gpu_rows(findings["gpus"]))}, indent=2)


def _show_footprint(output: JsonOutput) -> None:
    from adalink.tools.doctor.footprint import measure_footprint

    packages = measure_footprint()
    total = sum(int(str(entry["bytes"])) for entry in packages)
    output.give({"packages": packages, "total_bytes": total}, lambda: _print_footprint(packages, total))


def _print_footprint(packages: list[dict[str, object]], total: int) -> None:
    from adalink.tools.terminal.console import print_table

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
