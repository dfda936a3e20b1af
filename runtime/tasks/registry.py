"""Task registry of an open deployment: tasks are loaded at first use and resolved by name for each row."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from adalink.runtime.engine import Backend, SharedAdapterGraph
from adalink.runtime.errors import ContractError, IntegrityError, RequestError
from adalink.runtime.logs import get_logger
from adalink.runtime.request import Tasks
from adalink.runtime.storage.adapter import Adapter, decode_adapter, read_adapter
from adalink.runtime.storage.adapter_spec import AdapterSpec
from adalink.runtime.storage.contract import check_adapter
from adalink.runtime.storage.integrity import map_verified, read_graph, read_verified
from adalink.runtime.storage.known_tasks import check_tasks, split_name
from adalink.runtime.storage.lru import Held, LruTable
from adalink.runtime.storage.manifest import Manifest, Task
from adalink.runtime.storage.manifest_validation import check_task_name
from adalink.runtime.storage.tokenizer_digest import deployed_tokenizer_digest
from adalink.runtime.tasks.adapter_mapping import NO_ADAPTER, AdapterMapping, TokenEmbeddingDelta, combine, task_groups
from adalink.runtime.tasks.folding import Folded, ids_table, view_fold
from adalink.runtime.tasks.head import head_of
from adalink.runtime.tasks.kv_prefix import kv_prefixes_of
from adalink.runtime.tasks.nested import check_width, narrow
from adalink.runtime.tasks.soft_prompt import soft_prompts_of
from adalink.runtime.tasks.task_changes import Reload, compare_tasks, is_replaced

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class AddedTask:
    """A task outside the deployment folder: its adapter folder, and digest and settings when it was added."""

    folder: Path
    digest: str
    settings: AdapterSpec


class TaskRegistry:
    """Tasks by name; safe for several threads.

    A task's weights are loaded once, at its first use; those of the deployment are mapped from their file. Beyond
    ``memory_bytes``, the least recently used task is unloaded, and its next use loads it again. A running call keeps
    the weights it started with. Tasks change all at once: a call sees those before or those after a change.
    """

    def __init__(self, folder: Path, manifest: Manifest, backend: Backend, memory_bytes: int | None = None) -> None:
        self._folder = folder
        self._manifest = manifest
        self._backend = backend
        self._tasks: dict[str, Task | AddedTask] = dict(manifest.tasks)
        self._loaded: LruTable[str, AdapterMapping] = LruTable(memory_bytes, _log_unloaded)
        self._graphs: dict[str, SharedAdapterGraph] = {}
        self._version = 0  # counts changes of several tasks at once
        self._lock = threading.RLock()

    @property
    def manifest(self) -> Manifest:
        """The manifest whose tasks these are."""
        return self._manifest

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, sorted."""
        return tuple(sorted(self._tasks))

    def loaded(self) -> tuple[Manifest, dict[str, tuple[str, ...]]]:
        """The manifest, and the files of each task of it whose weights are in memory."""
        with self._lock:
            names = {split_name(name)[0] for name in self._loaded.entries}
            manifest, tasks = self._manifest, {name: self._tasks[name] for name in names}
        return manifest, {name: task.files for name, task in sorted(tasks.items()) if isinstance(task, Task)}

    def get(self, name: str) -> Held[AdapterMapping]:
        """The mapping of a batch of this task alone, with the size of its weights; loads the task if necessary.

        Raises ``UnknownTaskError`` or what loading raises. Two tasks are the same only if they are one object.
        """
        table = self._loaded
        loaded = table.entries.get(name)
        if loaded is None:
            with self._lock:
                self.check(name)
                loaded = table.entries.get(name) or self._hold(name, *self._load(name, self._tasks, self._manifest))
        loaded.last_used = next(table.clock)  # as ``table.get`` does, without a call: this is in every request's way
        return loaded

    def check(self, name: str) -> None:
        """Check that ``get`` takes a name, without reading anything.

        Raises ``UnknownTaskError``, or ``RequestError`` for dimensions that a task has not.
        """
        tasks = self._tasks
        check_tasks([name], tasks, nested=True)
        task = tasks[split_name(name)[0]]
        check_width(name, task.settings if isinstance(task, AddedTask) else task)

    def add(self, folder: Path, name: str | None, *, replace: bool = False) -> str:
        """Register an adapter folder in this process; see ``Deployment.add_task``."""
        name = folder.name if name is None else name
        check_task_name(name)
        adapter = read_adapter(folder)
        digest = deployed_tokenizer_digest(self._folder, self._manifest)
        check_adapter(
            adapter, self._manifest.base, f"adapter {folder}", holder="this deployment", tokenizer_digest=digest
        )
        loaded = self._prepare(adapter)
        with self._lock:
            if name in self._tasks and not replace:
                raise RequestError(
                    f"task {name!r} is deployed already: choose another name, remove it first, or pass replace=True"
                )
            self._drop(name)
            self._tasks = {**self._tasks, name: AddedTask(folder.resolve(), adapter.digest, adapter.config)}
            self._hold(name, *loaded)
        return name

    def reload(self, manifest: Manifest) -> Reload:
        """Take up the tasks of a newer manifest of the same base, all at once; those of ``add`` stay.

        Replaced tasks whose weights are in memory are loaded first, so that no request waits for them. If one cannot be
        loaded, its error is raised and nothing has changed. For one thread at a time.
        """
        _, loaded = self.loaded()
        names = [name for name in loaded if is_replaced(name, self._manifest, manifest)]
        ready = {name: self._load(name, manifest.tasks, manifest) for name in names}
        with self._lock:
            added = {name: task for name, task in self._tasks.items() if isinstance(task, AddedTask)}
            tasks: dict[str, Task | AddedTask] = {**manifest.tasks, **added}
            changes = compare_tasks(self._tasks, tasks, self._manifest, manifest)
            for name in (*changes.removed, *changes.replaced):
                self._drop(name)
            self._tasks, self._manifest = tasks, manifest
            for name in changes.replaced:
                if name in ready:
                    self._hold(name, *ready[name])
            self._version += 1
        return changes

    def remove(self, name: str) -> None:
        """Remove a task; raises ``UnknownTaskError``."""
        with self._lock:
            self._check_known(name)
            self._tasks = {key: task for key, task in self._tasks.items() if key != name}
            self._drop(name)

    def unload(self, name: str) -> None:
        """Free the memory of a task; its next use loads it again. Raises ``UnknownTaskError``."""
        with self._lock:
            self._check_known(name)
            self._drop(name)

    def resolve(self, tasks: Tasks, batch: int) -> AdapterMapping:
        """Adapter mapping of a batch: one task for all rows or one for each; ``None`` is the base model.

        Raises ``RequestError`` for entries that are not names or do not match the rows, and what ``get`` raises.
        """
        if tasks is None or isinstance(tasks, str):
            return NO_ADAPTER if tasks is None else self.get(tasks).value
        return combine([alone for _, alone in self.resolve_rows(tasks, batch)])

    def resolve_rows(self, tasks: Tasks, batch: int) -> list[tuple[str | None, AdapterMapping]]:
        """For each row its task's name and the mapping of a batch of that task alone; raises as ``resolve``.

        Rows of one task share one object. All are of the tasks before a reload, or all of those after it.
        """
        if tasks is None or isinstance(tasks, str):
            return [(tasks, self.resolve(tasks, batch))] * batch
        rows: list[str | None] = list(tasks) if isinstance(tasks, Iterable) else [tasks]
        if not all(name is None or isinstance(name, str) for name in rows):
            raise RequestError(f"tasks is {tasks!r}, expected a name, a list with one for each row, or None")
        if len(rows) != batch:
            raise RequestError(f"tasks has {len(rows)} entries for {batch} rows: give one name, or one for each row")
        while True:
            version = self._version
            alone = {name: self.get(name).value for name in dict.fromkeys(rows) if name is not None}
            if version == self._version:
                break
        return [(name, NO_ADAPTER if name is None else alone[name]) for name in rows]

    def _hold(self, name: str, mapping: AdapterMapping, size_bytes: int) -> Held[AdapterMapping]:
        """Hold a task's weights, and unload others beyond the budget; the caller holds the lock."""
        held = self._loaded.put(name, mapping, size_bytes)
        _LOG.info("loaded task %s: %d bytes", name, size_bytes)
        return held

    def _drop(self, task: str) -> None:
        """Free the memory of a task, and of each number of its dimensions; the caller holds the lock."""
        for name in [name for name in self._loaded.entries if task in (name, split_name(name)[0])]:
            self._loaded.pop(name)

    def _check_known(self, name: str) -> None:
        check_tasks([name], self._tasks)

    def _read(self, task: Task | AddedTask, manifest: Manifest) -> Adapter:
        """Read a task's adapter and check that it is the registered one."""
        if isinstance(task, AddedTask):
            adapter, origin, digest = read_adapter(task.folder), str(task.folder), task.digest
        else:
            config = read_verified(self._folder, manifest, task.config)
            weights = map_verified(self._folder, manifest, task.weights)
            adapter, origin, digest = decode_adapter(config, weights, task.config), task.config, task.adapter_digest
        base = manifest.base
        if adapter.digest != digest or adapter.config.base_fingerprint != base.fingerprint:
            raise ContractError(
                f"{origin}: adapter {adapter.digest} for {adapter.config.base_fingerprint}, expected was {digest} for "
                f"{base.fingerprint}: export or add the adapter again"
            )
        return adapter

    def _load(self, name: str, tasks: Mapping[str, Task | AddedTask], manifest: Manifest) -> tuple[AdapterMapping, int]:
        """A task ready to run, or the first dimensions of it, and its size in bytes."""
        task = tasks[split_name(name)[0]]
        whole = self._read(task, manifest)
        adapter = narrow(whole, name)
        if isinstance(task, AddedTask) or task.fold is None or adapter is not whole:
            return self._prepare(adapter)
        data = map_verified(self._folder, manifest, task.fold.path)
        try:
            fold = view_fold(task.fold.kind, data, adapter, manifest.base)
        except ValueError as error:
            raise IntegrityError(f"{task.fold.path}: {error}. Export the adapter again") from error
        return self._prepare(adapter, fold, data.nbytes)

    def _prepare(self, adapter: Adapter, fold: Folded | None = None, fold_bytes: int = 0) -> tuple[AdapterMapping, int]:
        config, base = adapter.config, self._manifest.base
        groups = task_groups(adapter, base.modalities, self._graph(config.activation_key))
        deltas = (
            [TokenEmbeddingDelta(None, config.scope, adapter.digest, ids_table(adapter))]
            if config.input == "ids"
            else []
        )
        prompts = [(None, prompt) for prompt in soft_prompts_of(adapter, base)]
        mapping = AdapterMapping(
            groups,
            fold,
            deltas=deltas,
            prompts=prompts,
            kv_prefixes=[(None, prefix) for prefix in kv_prefixes_of(adapter, base)],
            head=head_of(adapter),
            labels=config.labels,
        )
        return mapping, adapter.size_bytes + fold_bytes

    def _graph(self, activation_key: str) -> SharedAdapterGraph:
        """The shared adapter graph of one activation and bias, opened at its first use."""
        with self._lock:
            if activation_key not in self._graphs:
                base = self._manifest.base
                data = read_graph(self._folder, self._manifest, base.bank[activation_key])
                self._graphs[activation_key] = self._backend.open_bank(activation_key, data, base)
            return self._graphs[activation_key]


def _log_unloaded(name: str, held: Held[AdapterMapping]) -> None:
    _LOG.info("unloaded task %s: %d bytes", name, held.size)
