"""``export_genai``: a deployment as a folder for onnxruntime-genai, whose generators run its tasks.

The folder is a pipeline of type ``decoder-pipeline``: a small graph with the tasks' bottleneck, the unmodified base,
and a graph that puts its logits into the expected shape. Weights are linked where the disk has links, not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adalink.export.genai.config import genai_config, not_carried, tokenizer_config
from adalink.export.genai.graphs import build_head
from adalink.export.genai.place import CONFIG, HEAD, TOKENIZER_CONFIG, check_place
from adalink.export.pipeline.stages import Progress, Stages
from adalink.export.pipeline.tasks import INPUTS
from adalink.runtime.storage.atomic import write_through
from adalink.runtime.storage.atomic_folder import replace_folder


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
    out = Path(out)
    check_place(out, replace=replace)
    stages = Stages(Path(deployment), "onnxruntime-genai", variant=variant, tasks=tasks, copy=copy)
    with replace_folder(out.resolve(), f"folder {out}") as staging:
        stages.write(staging, progress)
        write_through(staging / HEAD, build_head(stages.base).SerializeToString())
        write_through(staging / CONFIG, genai_config(stages.base, stages.graph, INPUTS, stages.inputs))
        write_through(staging / TOKENIZER_CONFIG, tokenizer_config(stages.base, stages.read_chat_template()))
        size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    return GenaiFolder(
        variant=stages.variant,
        tasks=tuple(stages.adapters),
        inputs=INPUTS,
        size_bytes=size,
        linked_bytes=stages.linked_bytes,
        not_carried=not_carried(stages.base.generation),
        left_out=stages.left_out,
    )
