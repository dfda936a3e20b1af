"""The tasks of an open deployment: loaded on first use, and chosen by name for the rows of a batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from adalink.runtime.adapter import Adapter, decode_adapter, read_adapter
from adalink.runtime.bank import PLAIN, Part, Selection, task_parts
from adalink.runtime.engine import Backend, BankGraph
from adalink.runtime.errors import ContractError, RequestError, UnknownTaskError
from adalink.runtime.integrity import read_verified
from adalink.runtime.manifest import Manifest, Task, check_task_name


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """A task ready to run; two are the same only if they are one object.

    Attributes:
        parts: how a batch under this task runs.
        alone: the selection of a batch whose rows all have this task.
    """

    parts: Sequence[Part]
    alone: Selection


@dataclass(frozen=True)
class AddedTask:
    """A task that is not of the deployment folder: where it lies, and what it was when it was added."""

    folder: Path
    digest: str


class TaskTable:
    """Names to tasks. Safe for use from several threads."""

    def __init__(self, folder: Path, manifest: Manifest, backend: Backend) -> None:
        self._folder = folder
        self._manifest = manifest
        self._backend = backend
        self._tasks: dict[str, Task | AddedTask] = dict(manifest.tasks)
        self._loaded: dict[str, LoadedTask] = {}
        self._graphs: dict[str, BankGraph] = {}
        self._lock = threading.RLock()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, sorted."""
        return tuple(sorted(self._tasks))

    def get(self, name: str) -> LoadedTask:
        """The task, loaded now if it was not; raises ``UnknownTaskError`` or what loading raises."""
        loaded = self._loaded.get(name)
        if loaded is not None:
            return loaded
        with self._lock:
            if name in self._loaded:
                return self._loaded[name]
            self._check_known(name)
            self._loaded[name] = self._prepare(self._read(self._tasks[name]))
            return self._loaded[name]

    def add(self, folder: Path, name: str | None) -> str:
        """Register an adapter folder in this process; raises ``ContractError`` if it belongs to another base."""
        name = folder.name if name is None else name
        check_task_name(name)
        adapter = read_adapter(folder)
        base, config = self._manifest.base, adapter.config
        if config.base_fingerprint != base.fingerprint:
            raise ContractError(
                f"{folder} was trained for base {config.base_fingerprint}, this deployment holds {base.fingerprint} "
                f"({base.name}): use an adapter of this base"
            )
        if unknown := [modality for modality in config.modalities if modality not in base.modalities]:
            raise ContractError(
                f"{folder} adapts modality {unknown[0]!r}, {base.name} was exported for {', '.join(base.modalities)}: "
                "use an adapter without it, or export the base with it"
            )
        loaded = self._prepare(adapter)
        with self._lock:
            if name in self._tasks:
                raise RequestError(f"task {name!r} is deployed already: remove it first or choose another name")
            self._tasks[name] = AddedTask(folder.resolve(), adapter.digest)
            self._loaded[name] = loaded
        return name

    def remove(self, name: str) -> None:
        """Forget a task; raises ``UnknownTaskError``."""
        with self._lock:
            self._check_known(name)
            del self._tasks[name]
            self._loaded.pop(name, None)

    def unload(self, name: str) -> None:
        """Give back the memory of a task; its next use loads it again. Raises ``UnknownTaskError``."""
        with self._lock:
            self._check_known(name)
            self._loaded.pop(name, None)

    def resolve(self, rows: Sequence[str | None]) -> Selection:
        """The tasks of the rows of a batch, loaded; ``None`` is the plain base. Raises as ``get`` does."""
        first = rows[0]
        if all(name == first for name in rows):
            return PLAIN if first is None else self.get(first).alone
        members: dict[str, list[int]] = {}
        for row, name in enumerate(rows):
            if name is not None:
                members.setdefault(name, []).append(row)
        return Selection(
            [replace(part, rows=np.array(own)) for name, own in members.items() for part in self.get(name).parts]
        )

    def _check_known(self, name: str) -> None:
        if name not in self._tasks:
            raise UnknownTaskError(
                f"task {name!r} is not deployed here; deployed are: {', '.join(self.names) or 'none'}"
            )

    def _read(self, task: Task | AddedTask) -> Adapter:
        """Read a task and check that it is the one that was registered."""
        if isinstance(task, AddedTask):
            adapter, origin, digest = read_adapter(task.folder), str(task.folder), task.digest
        else:
            config = read_verified(self._folder, self._manifest, task.config)
            weights = read_verified(self._folder, self._manifest, task.weights)
            adapter, origin, digest = decode_adapter(config, weights, task.config), task.config, task.adapter_digest
        base = self._manifest.base
        if adapter.digest != digest or adapter.config.base_fingerprint != base.fingerprint:
            raise ContractError(
                f"{origin}: adapter {adapter.digest} for {adapter.config.base_fingerprint}, expected was {digest} for "
                f"{base.fingerprint}: export or add the adapter again"
            )
        return adapter

    def _prepare(self, adapter: Adapter) -> LoadedTask:
        parts = task_parts(adapter, self._manifest.base.modalities, self._graph(adapter.config.kind))
        return LoadedTask(parts, Selection(parts))

    def _graph(self, kind: str) -> BankGraph:
        """The bank graph of a kind, opened at its first use."""
        with self._lock:
            if kind not in self._graphs:
                base = self._manifest.base
                data = read_verified(self._folder, self._manifest, base.bank[kind])
                self._graphs[kind] = self._backend.open_bank(data, base)
            return self._graphs[kind]
