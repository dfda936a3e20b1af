"""The tasks of an open deployment: loaded on first use, applied row by row to a batch of embeddings."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adalink.runtime.adapter import CONFIG_FILE, WEIGHTS_FILE, decode_adapter, read_adapter
from adalink.runtime.engine import Array, Backend, TaskRunner
from adalink.runtime.errors import AdapterError, ContractError, RequestError, UnknownTaskError
from adalink.runtime.integrity import read_verified
from adalink.runtime.manifest import Manifest, Task, check_task_name

GRAPH_FILE = "adapter.onnx"


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """A task ready to run; two are the same only if they are one object."""

    task: Task
    runner: TaskRunner


class TaskTable:
    """Names to tasks, and their application. Safe for use from several threads.

    A call resolves its names once, so that it ends with the tasks it began with, whatever is added or
    removed meanwhile.
    """

    def __init__(self, folder: Path, manifest: Manifest, backend: Backend) -> None:
        self._folder = folder
        self._manifest = manifest
        self._backend = backend
        self._tasks: dict[str, Task] = dict(manifest.tasks)
        self._loaded: dict[str, LoadedTask] = {}
        self._lock = threading.Lock()

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
            if name not in self._tasks:
                raise UnknownTaskError(
                    f"task {name!r} is not deployed here; deployed are: {', '.join(self.names) or 'none'}"
                )
            self._loaded[name] = self._load(self._tasks[name])
            return self._loaded[name]

    def add(self, folder: Path, name: str | None) -> str:
        """Register a task folder in this process; raises ``ContractError`` if it belongs to another base."""
        name = folder.name if name is None else name
        check_task_name(name)
        adapter = read_adapter(folder)
        graph = folder / GRAPH_FILE
        if not graph.is_file():
            raise AdapterError(f"{folder} holds no {GRAPH_FILE}: run 'adalink export adapter' first")
        base, config = self._manifest.base, adapter.config
        if config.base_fingerprint != base.fingerprint:
            raise ContractError(
                f"{folder} was trained for base {config.base_fingerprint}, this deployment holds {base.fingerprint} "
                f"({base.name}): use an adapter of this base"
            )
        runner = self._backend.open_task(graph.read_bytes(), base, config.modalities)
        if runner.metadata.get("adapter_digest") != adapter.digest:
            raise ContractError(
                f"{graph} was exported from adapter {runner.metadata.get('adapter_digest')}, the weights beside it are "
                f"{adapter.digest}: export the adapter again"
            )
        task = Task(
            graph=GRAPH_FILE,
            config=CONFIG_FILE,
            weights=WEIGHTS_FILE,
            adapter_digest=adapter.digest,
            rank=config.rank,
            activation=config.activation,
            modalities=config.modalities,
            scope=config.scope,
        )
        with self._lock:
            if name in self._tasks:
                raise RequestError(f"task {name!r} is deployed already: remove it first or choose another name")
            self._tasks[name] = task
            self._loaded[name] = LoadedTask(task, runner)
        return name

    def remove(self, name: str) -> None:
        """Forget a task; raises ``UnknownTaskError``."""
        with self._lock:
            if name not in self._tasks:
                raise UnknownTaskError(f"task {name!r} is not deployed here; deployed are: {', '.join(self.names)}")
            del self._tasks[name]
            self._loaded.pop(name, None)

    def unload(self, name: str) -> None:
        """Give back the memory of a task of the deployment; its next use loads it again."""
        with self._lock:
            if name not in self._manifest.tasks or self._tasks.get(name) is not self._manifest.tasks[name]:
                raise UnknownTaskError(f"task {name!r} is not in the deployment folder: it could not be loaded again")
            self._loaded.pop(name, None)

    def resolve(self, names: list[str | None]) -> list[LoadedTask | None]:
        """The task of each row, loaded; ``None`` is the plain base. Raises as ``get`` does."""
        return [None if name is None else self.get(name) for name in names]

    def apply(
        self, embeds: Array, rows: list[LoadedTask | None], modality: Array | None = None, *, generated: bool = False
    ) -> Array:
        """Adapt each row by its task.

        Args:
            embeds: shape ``(batch, seq, d)``; not changed.
            rows: what ``resolve`` gave; rows of the plain base are returned bit for bit.
            modality: index in the base's modalities for each position, ``(batch, seq)``; ``None`` means text.
            generated: whether these are generated tokens, which a task of scope ``"prompt"`` leaves alone.
        """
        groups: dict[LoadedTask, list[int]] = {}
        for row, loaded in enumerate(rows):
            if loaded is not None and not (generated and loaded.task.scope == "prompt"):
                groups.setdefault(loaded, []).append(row)
        if not groups:
            return embeds
        first, members = next(iter(groups.items()))
        if len(members) == len(rows):
            return self._run(first, embeds, modality)
        result = embeds.copy()
        for loaded, members in groups.items():
            result[members] = self._run(loaded, embeds[members], None if modality is None else modality[members])
        return result

    def _run(self, loaded: LoadedTask, embeds: Array, modality: Array | None) -> Array:
        """Run one task graph, translating the base's modality indices into the adapter's."""
        own, known = loaded.task.modalities, self._manifest.base.modalities
        if modality is None:
            if own == known[:1]:
                return loaded.runner.run(embeds, None)
            modality = np.zeros(embeds.shape[:2], np.int64)
        translate = np.array([own.index(name) if name in own else -1 for name in known] + [-1], np.int64)
        indices = translate[modality]
        if len(own) > 1:
            return loaded.runner.run(embeds, indices)
        return np.where((indices == 0)[..., None], loaded.runner.run(embeds, None), embeds)

    def _load(self, task: Task) -> LoadedTask:
        """Read, check and open a task of the deployment folder."""
        config = read_verified(self._folder, self._manifest, task.config)
        weights = read_verified(self._folder, self._manifest, task.weights)
        adapter = decode_adapter(config, weights, origin=task.config)
        base = self._manifest.base
        if adapter.digest != task.adapter_digest or adapter.config.base_fingerprint != base.fingerprint:
            raise ContractError(
                f"{task.config}: adapter {adapter.digest} for {adapter.config.base_fingerprint}, the manifest says "
                f"{task.adapter_digest} for {base.fingerprint}: export the adapter again"
            )
        runner = self._backend.open_task(read_verified(self._folder, self._manifest, task.graph), base, task.modalities)
        if runner.metadata.get("adapter_digest") != task.adapter_digest:
            raise ContractError(
                f"{task.graph} was made from adapter {runner.metadata.get('adapter_digest')}, the manifest says "
                f"{task.adapter_digest}: export the adapter again"
            )
        return LoadedTask(task, runner)
