"""The stages that every host of several graphs runs: the graph with the tasks, and the unmodified base.

Weights are linked where the disk has links, not copied.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adalink.export.hard_links import hard_link
from adalink.export.pipeline.check import check_front
from adalink.export.pipeline.front import build_front
from adalink.export.pipeline.table import Lookup, copy_table, is_readable, refer_to_table
from adalink.export.pipeline.tasks import activations_of, check_task, left_out, task_tensors
from adalink.runtime.errors import ConfigError, IntegrityError
from adalink.runtime.storage.adapter import Adapter, read_adapter
from adalink.runtime.storage.atomic import write_through
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.embedding_table import EmbeddingTable, open_table
from adalink.runtime.storage.integrity import locate, verify_files
from adalink.runtime.storage.known_tasks import check_tasks
from adalink.runtime.storage.manifest import Base, Variant
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.variants import choose_variant

if TYPE_CHECKING:
    import onnx

FRONT, TABLE, BASE, TASKS = "front.onnx", "embeddings.data", "base.safetensors", "tasks"
# Text beside the tensors of a task file that the kit wrote.
DIGEST_KEY, FINGERPRINT_KEY = "adapter_digest", "base_fingerprint"

Progress = Callable[[str, float | None], None]


class Stages:
    """Writes the stages of one deployment into a folder.

    Attributes:
        base: the contract.
        variant: name of the variant whose graph is written.
        graph: file name of that graph.
        adapters: the tasks.
        activations: those that the graph with the tasks computes.
        tokenizer: file name of the tokenizer.
        inputs: names of the inputs of the base's graph, without the cache.
        linked_bytes: how many bytes the folder shares with the deployment.
    """

    def __init__(
        self,
        deployment: Path,
        host: str,
        *,
        variant: str | None = None,
        tasks: Sequence[str] | None = None,
        copy: bool = False,
    ) -> None:
        """Read a deployment and check that its base and tasks can go.

        Args:
            deployment: the deployment folder.
            host: where they go, in errors.
            variant: the base variant, one for ``onnxruntime-cpu``; by default as ``Deployment.open`` chooses.
            tasks: the tasks; all by default.
            copy: copy weights even where they could be linked.

        Raises:
            BackendError: there is no such variant.
            ConfigError: the base or a task cannot go there; says why.
            DeploymentError: no deployment, or (``IntegrityError``) a damaged one.
            UnknownTaskError: a task is not deployed.
        """
        manifest = read_manifest(deployment)
        self._folder, self._manifest, self._copy, self._host = deployment, manifest, copy, host
        self.base, self.variant = manifest.base, choose_variant(manifest, "onnxruntime-cpu", variant)
        chosen = sorted(manifest.tasks) if tasks is None else list(dict.fromkeys(tasks))
        check_tasks(chosen, manifest.tasks)
        check_base(manifest.base, host)
        if manifest.base.tokenizer is None:
            raise ConfigError(f"base {self.base.name} has no tokenizer, and {host} needs one: export it with one")
        self._tokenizer = manifest.base.tokenizer
        self.tokenizer = Path(self._tokenizer).name
        self.adapters = {task: self._read_task(task) for task in chosen}
        self.activations = activations_of(self.adapters.values())
        path = locate(deployment, self._entry.graph)
        self.graph = path.name
        self.inputs, self._positions = base_inputs(path, self.base, host)
        self.linked_bytes = 0

    def write(self, staging: Path, progress: Progress) -> None:
        """Write the base, the graph with the tasks, the tokenizer and the tasks.

        Raises:
            GraphError: the graph of the tasks does not compute them.
            IntegrityError: a file of the deployment was altered.
        """
        progress("linking the base", None)
        for path in self._entry.files:
            self._link(path, staging)
        table = open_table(locate(self._folder, self.base.embeddings), self.base)
        front = build_front(self.base, self._lookup(staging, table), self.activations, self._positions)
        write_through(staging / FRONT, front.SerializeToString())
        self._link(self._tokenizer, staging)
        self._write_tasks(staging)
        check_front(staging / FRONT, table, self.adapters, self.activations, progress)

    @property
    def left_out(self) -> dict[str, tuple[str, ...]]:
        """Parts of tasks that stay in the kit, by task; a task that goes whole is not there."""
        return {task: parts for task, adapter in self.adapters.items() if (parts := left_out(adapter))}

    def read_chat_template(self) -> str | None:
        """The chat template; ``None`` without one."""
        if self.base.chat_template is None:
            return None
        verify_files(self._folder, self._manifest, (self.base.chat_template,))
        return locate(self._folder, self.base.chat_template).read_text(encoding="utf-8")

    @property
    def _entry(self) -> Variant:
        return self._manifest.variants[self.variant]

    def _read_task(self, task: str) -> Adapter:
        entry = self._manifest.tasks[task]
        verify_files(self._folder, self._manifest, (entry.config, entry.weights))
        adapter = read_adapter(locate(self._folder, entry.config).parent)
        check_task(adapter, f"task {task}", self._host)
        return adapter

    def _lookup(self, staging: Path, table: EmbeddingTable) -> Lookup:
        if is_readable(self.base):
            path = self.base.embeddings
            name = Path(path).name if path in self._entry.files else TABLE
            if name == TABLE:
                self._link(path, staging, name)
            return refer_to_table(self.base, staging / name)
        verify_files(self._folder, self._manifest, (self.base.embeddings,))
        return copy_table(self.base, table, staging / FRONT)

    def _write_tasks(self, staging: Path) -> None:
        from safetensors.numpy import save

        width, fingerprint = self.base.hidden_size, self.base.fingerprint
        (staging / TASKS).mkdir()
        write_through(staging / BASE, save(task_tensors(None, self.activations, width)))
        for task, adapter in self.adapters.items():
            about = {DIGEST_KEY: adapter.digest, FINGERPRINT_KEY: fingerprint}
            data = save(task_tensors(adapter, self.activations, width), about)
            write_through(staging / TASKS / f"{task}.safetensors", data)

    def _link(self, path: str, staging: Path, name: str | None = None) -> None:
        """Put a file of the deployment into the folder; what lies there has the recorded digest."""
        source, record = locate(self._folder, path), self._manifest.files[path]
        target = staging / (name or source.name)
        is_linked = not self._copy and hard_link(source, target)
        if not is_linked:
            shutil.copyfile(source, target)
        if digest_file(target) != record.sha256:
            raise IntegrityError(f"{path} was altered: export it again or restore it from a good copy")
        self.linked_bytes += record.size_bytes if is_linked else 0


def base_inputs(path: Path, base: Base, host: str) -> tuple[tuple[str, ...], int | None]:
    """Inputs of a base graph without the cache, and the axes of its position ids, ``None`` if it takes none.

    Raises:
        ConfigError: it has no cache that is written in place, or takes what a text does not say.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    taken = {value.name: value for value in graph.input if not value.name.startswith("past_key_values.")}
    if "sequence_lengths" not in taken:
        raise ConfigError(
            f"base {base.name}: this variant's cache grows, and {host} gives one that is written in place: "
            "export the base with --target onnxruntime-cpu, and name that variant"
        )
    known = ("inputs_embeds", "sequence_lengths", "logits_at", "position_ids")
    if unknown := sorted(taken.keys() - set(known)):
        raise ConfigError(f"base {base.name}: its graph takes {', '.join(unknown)}, which {host} does not give")
    return tuple(name for name in known if name in taken), _axes(taken.get("position_ids"))


def _axes(value: onnx.ValueInfoProto | None) -> int | None:
    if value is None:
        return None
    sizes = value.type.tensor_type.shape.dim
    return int(sizes[2].dim_value) if len(sizes) > 2 else 0


def check_base(base: Base, host: str) -> None:
    """Check that a base generates text from texts alone; raises ``ConfigError``."""
    if base.kind != "decoder" or base.cache is None:
        raise ConfigError(f"base {base.name} is an {base.kind}: {host} generates text, with decoders alone")
    if base.bidirectional_prompt:
        raise ConfigError(f"base {base.name} reads its prompts in both directions, which {host} does not do")
    if base.embedding_dtype == "bfloat16":
        raise ConfigError(
            f"base {base.name} is in bfloat16, in which ONNX Runtime computes little on a CPU: export fp32"
        )
