"""``export_adapter``: adapters to tasks of a deployment. Nothing else in the deployment changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np

from adalink.export.adapter.check import check_ids_table, check_in_bank, check_task_graph
from adalink.export.adapter.folding import FOLD_FILES, check_foldable, fold_task
from adalink.export.adapter.head_graph import build_head_graph, check_head_graph
from adalink.export.adapter.peft import convert_peft
from adalink.export.adapter.session import OpenGraph
from adalink.export.adapter.task_graph import build_task_graph
from adalink.export.writer import DeploymentWriter, open_writer
from adalink.runtime.errors import ContractError, DeploymentError
from adalink.runtime.storage.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    decode_adapter,
    encode_adapter,
    read_folder,
    read_method,
)
from adalink.runtime.storage.adapter_spec import settings_of
from adalink.runtime.storage.contract import check_adapter
from adalink.runtime.storage.embedding_table import open_table
from adalink.runtime.storage.integrity import read_graph
from adalink.runtime.storage.manifest import Base, Fold, Manifest, Task
from adalink.runtime.storage.manifest_validation import check_task_name
from adalink.runtime.storage.safetensors import as_float32
from adalink.runtime.storage.tokenizer_digest import deployed_tokenizer_digest
from adalink.runtime.storage.variants import variant_digest
from adalink.runtime.storage.verification_cache import verify_once

GRAPH_FILE, HEAD_FILE = "adapter.onnx", "head.onnx"
_CHECKED_ROWS = 64


def export_adapter(
    adapter_folder: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    dtype: str | None = None,
    replace: bool = False,
    fold: str | None = None,
    assume_base: bool = False,
) -> Manifest:
    """Add an adapter to a deployment as a task.

    Args:
        adapter_folder: a folder that training wrote, or a PEFT folder of a method that acts on the input
            (`adalink.export.adapter.peft`).
        out: the deployment.
        name: name of the task; the adapter folder's by default.
        dtype: dtype of the task graph's input and output; the base's by default, and no other fits.
        replace: whether a task of that name may be there already.
        fold: precompute the task for every token, as ``"table"`` (`adalink.runtime.tasks.folding`).
        assume_base: accept a PEFT folder as trained for this base; the folder itself cannot tell.

    Returns:
        The deployment's manifest.

    Raises:
        AdapterError: the adapter folder is broken.
        ConfigError: the adapter cannot be folded.
        ContractError: the adapter belongs to another base.
        DeploymentError: there is no deployment, the name is taken or unusable, or the folder cannot be written.
        GraphError: the finished graph, or the deployment's bank graph, does not compute the adapter.
    """
    task = Path(adapter_folder).resolve().name if name is None else name
    return export_adapters(
        {task: adapter_folder}, out, dtype=dtype, replace=replace, fold=fold, assume_base=assume_base
    )


def export_adapters(
    adapter_folders: Mapping[str, str | Path | Adapter],
    out: str | Path,
    *,
    dtype: str | None = None,
    replace: bool = False,
    fold: str | None = None,
    assume_base: bool = False,
    progress: Callable[[int, str], None] = lambda done, task: None,
) -> Manifest:
    """Add many adapters to a deployment in one change: all of them or none.

    Args:
        adapter_folders: adapter folder of each task, by the task's name; or the adapter itself.
        out: the deployment.
        dtype: see ``export_adapter``.
        replace: likewise.
        fold: likewise.
        assume_base: likewise.
        progress: called with the number of tasks done and the name of the next.

    Raises:
        AdaLinkError: as ``export_adapter``.
    """
    for task in adapter_folders:
        check_task_name(task)
    with open_writer(out) as writer:
        exporter = None
        tasks = dict(writer.manifest.tasks)
        for done, (task, folder) in enumerate(adapter_folders.items()):
            progress(done, task)
            origin = f"task {task}" if isinstance(folder, Adapter) else f"adapter {folder}"
            adapter = folder if isinstance(folder, Adapter) else _read(folder, writer.manifest.base, assume_base)
            digest = deployed_tokenizer_digest(writer.folder, writer.manifest)
            check_adapter(
                adapter,
                writer.manifest.base,
                origin,
                holder=f"deployment {out}",
                tokenizer_digest=digest,
            )
            _check_dtype(writer.manifest.base, dtype, origin, out)
            _check_variant(writer.manifest, adapter, origin, out)
            if fold is not None:
                check_foldable(fold, adapter, origin=origin)
            check_free(task, writer.manifest, out, replace=replace)
            exporter = exporter or _Exporter(writer)
            tasks[task] = exporter.write(task, adapter, fold)
        return writer.commit(msgspec.structs.replace(writer.manifest, tasks=tasks))


def check_free(task: str, manifest: Manifest, out: str | Path, *, replace: bool) -> None:
    """Check that a deployment has no task of a name, unless it is to be replaced; raises ``DeploymentError``."""
    if task in manifest.tasks and not replace:
        raise DeploymentError(
            f"deployment {out} already has a task {task!r}: pass --replace to put this adapter in its place, "
            "or --name to give it another name"
        )


def _read(folder: str | Path, base: Base, assume_base: bool) -> Adapter:
    """An adapter folder, of this kit or of PEFT."""
    config, weights = read_folder(folder)
    origin = f"adapter {folder}"
    if read_method(config, origin) == "ADALINK":
        return decode_adapter(config, weights, origin)
    return convert_peft(config, weights, base, origin, assume_base=assume_base)


class _Exporter:
    """Writes tasks in one change of a deployment; opens what they share once."""

    def __init__(self, writer: DeploymentWriter) -> None:
        self._writer = writer
        self._manifest = writer.manifest
        self._dtype = writer.manifest.base.embedding_dtype
        # Data of a graph that hold the table may be large: they are read again after a change alone.
        verified = verify_once(writer.folder, writer.manifest, [self._manifest.base.embeddings])
        self._table = open_table(writer.folder / self._manifest.base.embeddings, self._manifest.base)
        verified.check_unchanged()
        # Tokens to run a new graph on, evenly spread.
        self._ids = np.unique(np.linspace(0, len(self._table) - 1, _CHECKED_ROWS).astype(np.int64))
        self._rows = as_float32(self._table.take(self._ids))
        self._bank_graphs: dict[str, OpenGraph] = {}

    def write(self, task: str, adapter: Adapter, fold: str | None) -> Task:
        """Build, check and stage the files of one task; raises ``GraphError``."""
        graph = build_task_graph(adapter, task, self._dtype).SerializeToString(deterministic=True)
        check_task_graph(OpenGraph(graph, self._dtype), adapter, self._dtype, self._rows, self._ids)
        if adapter.config.input == "ids":
            check_ids_table(adapter, self._table, self._dtype, self._ids)
        elif adapter.config.rank:
            check_in_bank(self._bank_graph(adapter.config.activation_key), adapter, self._dtype, self._rows)
        folder = self._writer.fresh_folder(f"tasks/{task}")
        config, weights = encode_adapter(adapter)
        for file, data in ((GRAPH_FILE, graph), (CONFIG_FILE, config), (WEIGHTS_FILE, weights)):
            self._writer.stage(f"{folder}/{file}").write_bytes(data)
        folded = None
        if fold is not None:
            folded = Fold(kind=fold, path=f"{folder}/{FOLD_FILES[fold]}")
            bank, base = self._bank_graph(adapter.config.activation_key), self._manifest.base
            self._writer.stage(folded.path).write_bytes(fold_task(fold, adapter, base, self._table, bank))
        head_graph = None
        if adapter.config.head is not None:
            head = build_head_graph(adapter, task, self._dtype).SerializeToString(deterministic=True)
            check_head_graph(head, adapter, self._dtype)
            head_graph = f"{folder}/{HEAD_FILE}"
            self._writer.stage(head_graph).write_bytes(head)
        return Task(
            graph=f"{folder}/{GRAPH_FILE}",
            config=f"{folder}/{CONFIG_FILE}",
            weights=f"{folder}/{WEIGHTS_FILE}",
            adapter_digest=adapter.digest,
            fold=folded,
            head_graph=head_graph,
            **settings_of(adapter.config),
        )

    def _bank_graph(self, activation_key: str) -> OpenGraph:
        if activation_key not in self._bank_graphs:
            data = read_graph(self._writer.folder, self._manifest, self._manifest.base.bank[activation_key])
            self._bank_graphs[activation_key] = OpenGraph(data, self._dtype)
        return self._bank_graphs[activation_key]


def _check_dtype(base: Base, dtype: str | None, origin: str, folder: str | Path) -> None:
    """A task graph has its base's dtype; raises ``ContractError``."""
    if dtype not in (None, base.embedding_dtype):
        raise ContractError(
            f"{origin}: a task graph of {dtype} was asked for, the base of {folder} takes {base.embedding_dtype}: "
            "leave the dtype out, or export the base in that dtype into another folder"
        )


def _check_variant(manifest: Manifest, adapter: Adapter, origin: str, folder: str | Path) -> None:
    """A KV prefix that a variant computed belongs to it; raises ``ContractError``."""
    prefix = adapter.config.kv_prefix
    digests = {name: variant_digest(manifest, variant) for name, variant in manifest.variants.items()}
    if prefix is not None and prefix.variant_digest and prefix.variant_digest not in digests.values():
        raise ContractError(
            f"{origin}: its KV prefix was computed by the base variant {prefix.variant_digest}, and {folder} has only "
            f"{', '.join(f'{name} ({digest})' for name, digest in sorted(digests.items()))}: compute it there, with "
            "'adalink export prefix'"
        )
