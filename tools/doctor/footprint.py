"""Installed size of the runtime: the kit and every package it needs to run."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

KIT = "adalink-kit"
# Extras that run deployments; those of training and export stay on the workstation.
RUNTIME_EXTRAS = ("cpu", "gpu", "tensorrt", "tensorrt-rtx")


def runtime_packages() -> dict[str, metadata.Distribution]:
    """The kit and the packages its runtime needs, by name: required ones, and those of runtime extras that are here."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    distributions: dict[str, metadata.Distribution] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(KIT, frozenset(RUNTIME_EXTRAS))]
    visited: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        entry = waiting.pop()
        name, extras = entry
        if entry in visited:
            continue
        visited.add(entry)
        try:
            package = distributions.setdefault(name, metadata.distribution(name))
        except metadata.PackageNotFoundError:
            continue
        for line in package.requires or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return distributions


def installed_bytes(package: metadata.Distribution) -> int:
    """Size of a package's installed files, compiled ones included; of an editable kit, of its source folders."""
    if package.name == KIT and _is_editable(package):
        return sum(_tree_bytes(folder) for folder in _kit_folders())
    paths = {Path(str(package.locate_file(file))).resolve() for file in package.files or []}
    return sum(path.stat().st_size for path in paths if path.is_file())


def measure_footprint() -> list[dict[str, object]]:
    """Name, version and installed bytes of each runtime package, the largest first."""
    rows = [(installed_bytes(package), package.name, package.version) for package in runtime_packages().values()]
    return [{"package": name, "version": version, "bytes": size} for size, name, version in sorted(rows, reverse=True)]


def _is_editable(package: metadata.Distribution) -> bool:
    return not any(str(file).startswith("adalink/") for file in package.files or [])


def _kit_folders() -> Iterable[Path]:
    import adalink.export
    import adalink.runtime
    import adalink.tools
    import adalink.training

    for part in (adalink.runtime, adalink.tools, adalink.export, adalink.training):
        yield from (Path(folder) for folder in part.__path__)


def _tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
