"""What verbs that run a deployment can check before its engine is opened: its folder, backend, variant and tasks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adalink.runtime.backends import check_backend
from adalink.runtime.errors import UnknownTaskError
from adalink.runtime.near_names import did_you_mean
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.variants import choose_variant


def check_deployment(
    folder: Path, tasks: Iterable[str | None] = (), *, backend: str = "onnxruntime-cpu", variant: str | None = None
) -> Manifest:
    """Check that a deployment has these tasks and a base for the backend; returns its manifest.

    Args:
        folder: the deployment.
        tasks: names of tasks; ``None`` is the base model.
        backend: the backend that will run it.
        variant: name of the variant, if one was asked for.

    Raises:
        AdaLinkError: it has not.
    """
    manifest = read_manifest(folder)
    check_backend(backend)
    choose_variant(manifest, backend, variant)
    known = sorted(manifest.tasks)
    if unknown := next((task for task in tasks if task is not None and task not in manifest.tasks), None):
        raise UnknownTaskError(
            f"task {unknown!r} is not deployed here; deployed are: {', '.join(known) or 'none'}"
            f"{did_you_mean(unknown, known)}"
        )
    return manifest
