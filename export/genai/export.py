"""``export_genai``: a deployment as a folder for onnxruntime-genai, whose generators run its tasks.

The folder is a pipeline of type ``decoder-pipeline``: a small graph with the tasks' bottleneck, the unmodified base,
and a graph that puts its logits into the expected shape. Weights are linked where the disk has links, not copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adalink.export.genai.check import check_front
from adalink.export.genai.config import genai_config, not_carried, tokenizer_config
from adalink.export.genai.graphs import build_front, build_head
from adalink.export.genai.place import (
    BASE,
    CONFIG,
    DIGEST_KEY,
    FRONT,
    HEAD,
    TABLE,
    TASKS,
    TOKENIZER_CONFIG,
    check_place,
)
from adalink.export.genai.table import Lookup, copy_table, is_readable, refer_to_table
from adalink.export.genai.tasks import INPUTS, activations_of, check_task, left_out, task_tensors
from adalink.runtime.errors import ConfigError, IntegrityError
from adalink.runtime.storage.adapter import Adapter, read_adapter
from adalink.runtime.storage.atomic import write_through
from adalink.runtime.storage.atomic_folder import replace_folder
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.embedding_table import EmbeddingTable, open_table
from adalink.runtime.storage.integrity import locate, verify_files
from adalink.runtime.storage.known_tasks import check_tasks
from adalink.runtime.storage.manifest import Base, Manifest
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.variants import choose_variant

if TYPE_CHECKING:
    import onnx

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class GenaiFolder:
    """A folder that was written.

    Attributes:
        variant: the variant whose graph it has.
        tasks: its tasks.
        inputs: names of the inputs that each generator must be given.
        size_bytes: bytes of its files.
        linked_bytes: how many of them it shares with the deployment.
        not_carried: generation defaults that the folder does not say.
        left_out: parts of tasks that stay in the kit, by task.
    """

    variant: str
    tasks: tuple[str, ...]
    inputs: tuple[str, ...]
    size_bytes: int
    linked_bytes: int
    not_carried: dict[str, object]
    left_out: dict[str, tuple[str, ...]]


def export_genai(
    deployment: str | Path,
    out: str | Path,
    *,
    variant: str | None = None,
    tasks: Sequence[str] | None = None,
    replace: bool = False,
    copy: bool = False,
    progress: Progress = lambda line, done: None,
) -> GenaiFolder:
    """Write a folder for onnxruntime-genai.

    Args:
        deployment: the deployment folder.
        out: the folder to write.
        variant: the base variant, one for ``onnxruntime-cpu``; by default as ``Deployment.open`` chooses.
        tasks: the tasks; all by default.
        replace: whether such a folder may be there already.
        copy: copy weights even where they could be linked.
        progress: called with a line, and how far it is from 0 to 1.

    Raises:
        BackendError: there is no such variant.
        ConfigError: the base or a task cannot go there; says why.
        DeploymentError: no deployment, or (``IntegrityError``) a damaged one; or the place is taken.
        GraphError: the graph of the tasks does not compute them.
        UnknownTaskError: a task is not deployed.
    """
    folder, out = Path(deployment), Path(out)
    check_place(out, replace=replace)
    manifest = read_manifest(folder)
    name = choose_variant(manifest, "onnxruntime-cpu", variant)
    chosen = sorted(manifest.tasks) if tasks is None else list(dict.fromkeys(tasks))
    check_tasks(chosen, manifest.tasks)
    _check_base(manifest)
    writer = _Writer(folder, manifest, name, copy=copy)
    adapters = {task: writer.read_task(task) for task in chosen}
    with replace_folder(out.resolve(), f"folder {out}") as staging:
        writer.write(staging, adapters, progress)
        size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    return GenaiFolder(
        variant=name,
        tasks=tuple(chosen),
        inputs=INPUTS,
        size_bytes=size,
        linked_bytes=writer.linked_bytes,
        not_carried=not_carried(manifest.base.generation),
        left_out={task: parts for task, adapter in adapters.items() if (parts := left_out(adapter))},
    )


class _Writer:
    """Writes one folder."""

    def __init__(self, folder: Path, manifest: Manifest, variant: str, *, copy: bool) -> None:
        self._folder, self._manifest, self._base = folder, manifest, manifest.base
        self._variant, self._copy = manifest.variants[variant], copy
        self.linked_bytes = 0

    def read_task(self, task: str) -> Adapter:
        entry = self._manifest.tasks[task]
        verify_files(self._folder, self._manifest, (entry.config, entry.weights))
        adapter = read_adapter(locate(self._folder, entry.config).parent)
        check_task(adapter, f"task {task}")
        return adapter

    def write(self, staging: Path, adapters: dict[str, Adapter], progress: Progress) -> None:
        base, graph = self._base, Path(self._variant.graph).name
        inputs, positions = base_inputs(locate(self._folder, self._variant.graph), base)
        progress("linking the base", None)
        for path in self._variant.files:
            self._link(path, staging)
        activations = activations_of(adapters.values())
        table = open_table(locate(self._folder, base.embeddings), base)
        front = build_front(base, self._lookup(staging, table), activations, positions)
        write_through(staging / FRONT, front.SerializeToString())
        write_through(staging / HEAD, build_head(base).SerializeToString())
        write_through(staging / CONFIG, genai_config(base, graph, INPUTS, inputs))
        self._write_tokenizer(staging)
        self._write_tasks(staging, adapters, activations)
        check_front(staging / FRONT, table, adapters, activations, progress)

    def _lookup(self, staging: Path, table: EmbeddingTable) -> Lookup:
        if is_readable(self._base):
            path = self._base.embeddings
            name = Path(path).name if path in self._variant.files else TABLE
            if name == TABLE:
                self._link(path, staging, name)
            return refer_to_table(self._base, staging / name)
        verify_files(self._folder, self._manifest, (self._base.embeddings,))
        return copy_table(self._base, table, staging / FRONT)

    def _write_tokenizer(self, staging: Path) -> None:
        base = self._base
        if base.tokenizer is None:
            raise ConfigError(f"base {base.name} has no tokenizer, and onnxruntime-genai needs one: export it with one")
        self._link(base.tokenizer, staging)
        template = None
        if base.chat_template is not None:
            verify_files(self._folder, self._manifest, (base.chat_template,))
            template = locate(self._folder, base.chat_template).read_text(encoding="utf-8")
        write_through(staging / TOKENIZER_CONFIG, tokenizer_config(base, template))

    def _write_tasks(self, staging: Path, adapters: dict[str, Adapter], activations: tuple[str, ...]) -> None:
        from safetensors.numpy import save

        width = self._base.hidden_size
        (staging / TASKS).mkdir()
        write_through(staging / BASE, save(task_tensors(None, activations, width)))
        for task, adapter in adapters.items():
            data = save(task_tensors(adapter, activations, width), {DIGEST_KEY: adapter.digest})
            write_through(staging / TASKS / f"{task}.safetensors", data)

    def _link(self, path: str, staging: Path, name: str | None = None) -> None:
        """Put a file of the deployment into the folder; what lies there has the recorded digest."""
        source, record = locate(self._folder, path), self._manifest.files[path]
        target = staging / (name or source.name)
        is_linked = not self._copy and _hard_link(source, target)
        if not is_linked:
            shutil.copyfile(source, target)
        if digest_file(target) != record.sha256:
            raise IntegrityError(f"{path} was altered: export it again or restore it from a good copy")
        self.linked_bytes += record.size_bytes if is_linked else 0


def base_inputs(path: Path, base: Base) -> tuple[tuple[str, ...], int | None]:
    """Inputs of a base graph without the cache, and the axes of its position ids, ``None`` if it takes none.

    Raises:
        ConfigError: it has no cache that is written in place, or takes what a text does not say.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    taken = {value.name: value for value in graph.input if not value.name.startswith("past_key_values.")}
    if "sequence_lengths" not in taken:
        raise ConfigError(
            f"base {base.name}: this variant's cache grows, and onnxruntime-genai gives one that is written in place: "
            "export the base with --target onnxruntime-cpu, and name that variant"
        )
    known = ("inputs_embeds", "sequence_lengths", "logits_at", "position_ids")
    if unknown := sorted(taken.keys() - set(known)):
        raise ConfigError(
            f"base {base.name}: its graph takes {', '.join(unknown)}, which onnxruntime-genai does not give"
        )
    return tuple(name for name in known if name in taken), _axes(taken.get("position_ids"))


def _axes(value: onnx.ValueInfoProto | None) -> int | None:
    if value is None:
        return None
    sizes = value.type.tensor_type.shape.dim
    return int(sizes[2].dim_value) if len(sizes) > 2 else 0


def _check_base(manifest: Manifest) -> None:
    base = manifest.base
    if base.kind != "decoder" or base.cache is None:
        raise ConfigError(f"base {base.name} is an {base.kind}: onnxruntime-genai generates text, with decoders alone")
    if base.bidirectional_prompt:
        raise ConfigError(f"base {base.name} reads its prompts in both directions, which onnxruntime-genai does not do")
    if base.embedding_dtype == "bfloat16":
        raise ConfigError(
            f"base {base.name} is in bfloat16, in which ONNX Runtime computes little on a CPU: export fp32"
        )


def _hard_link(source: Path, target: Path) -> bool:
    """Link a file; whether the disk has such links, and both places are on one disk."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        return False
    return True
