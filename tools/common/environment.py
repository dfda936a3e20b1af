"""The environment of a measurement, for reports: machine, Python, packages and threads."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "adalink-kit",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
    "cuda-bindings",
    "onnx",
    "torch",
    "transformers",
    "tokenizers",
)


def describe_environment() -> dict[str, object]:
    """Machine and versions, ready for JSON; packages that are not installed are left out."""
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "memory_bytes": _memory_bytes(),
        "python": platform.python_version(),
        "packages": package_versions(PACKAGES),
    }


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions; a package that is not installed is left out."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_bytes() -> int | None:
    """Physical memory; ``None`` where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
