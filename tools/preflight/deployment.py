"""What verbs that run a deployment can check before its engine is opened: its folder, backend, variant and tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from adalink.runtime.backends import check_backend
from adalink.runtime.errors import RequestError
from adalink.runtime.storage.known_tasks import check_tasks, split_name
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.variants import choose_variant
from adalink.runtime.tasks.nested import check_width


class TaskRow(Protocol):
    """A row that may name a task, and its file and line."""

    @property
    def task(self) -> str | None:
        """The task; ``None`` for the base model."""

    @property
    def origin(self) -> str | None:
        """File and line; nothing for what is no row of a file."""


R = TypeVar("R", bound=TaskRow)


def check_deployment(
    folder: Path,
    tasks: Iterable[str | None] = (),
    *,
    backend: str = "onnxruntime-cpu",
    variant: str | None = None,
    nested: bool = False,
) -> Manifest:
    """Check that a deployment has these tasks and a base for the backend; returns its manifest.

    Args:
        folder: the deployment.
        tasks: names of tasks; ``None`` is the base model.
        backend: the backend that will run it.
        variant: name of the variant, if one was asked for.
        nested: whether a name may ask for some dimensions of a task, as in ``topics@8``.

    Raises:
        AdaLinkError: it has not.
    """
    manifest = read_manifest(folder)
    check_backend(backend)
    choose_variant(manifest, backend, variant)
    for task in tasks:
        _check_task(task, manifest, nested=nested)
    return manifest


def check_row_tasks(
    manifest: Manifest, rows: Iterable[R], refuse: Callable[[R, RequestError], None] | None = None
) -> list[R]:
    """Check that a deployment has the tasks of rows; returns the rows whose task it has.

    Args:
        manifest: of the deployment.
        rows: the rows.
        refuse: called with a row whose task is unknown, and the error; without it the error is raised.

    Raises:
        RequestError: it has not; the message names the row.
    """
    good = []
    for row in rows:
        try:
            _check_task(row.task, manifest, row.origin or "", nested=True)
        except RequestError as error:
            if refuse is None:
                raise
            refuse(row, error)
        else:
            good.append(row)
    return good


def _check_task(name: str | None, manifest: Manifest, place: str = "", *, nested: bool) -> None:
    check_tasks([name], manifest.tasks, place, nested=nested)
    if nested and name is not None:
        check_width(name, manifest.tasks[split_name(name)[0]])
