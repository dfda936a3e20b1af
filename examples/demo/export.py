"""What the demo exports: a base and its adapters, unless the same are there already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from examples.demo import Progress

if TYPE_CHECKING:
    from adalink.runtime.storage.manifest import Manifest
    from examples.demo.state import DemoState


def export_all(path: Path, source: Path, adapters: list[Path], state: DemoState, progress: Progress) -> Manifest:
    """Export the base and the adapters, unless the same are there already."""
    from adalink.export.adapter.export import export_adapter
    from adalink.export.base.export import export_base
    from adalink.runtime.storage.adapter import read_adapter
    from adalink.runtime.storage.manifest_io import read_manifest

    if state.holds_base():
        progress("base: exported before from the same model by the same kit, reused")
        manifest = read_manifest(path)
    else:
        state.begin()
        manifest = export_base(source, path, progress=lambda line: progress(f"base: {line}"))
        state.set_base()
    for folder in adapters:
        digest = read_adapter(folder).digest
        deployed = manifest.tasks.get(folder.name)
        if deployed is not None and deployed.adapter_digest == digest:
            progress(f"task {folder.name}: exported before from the same adapter, reused")
            continue
        progress(f"task {folder.name}: exporting")
        manifest = export_adapter(folder, path, replace=deployed is not None)
    return manifest
