"""``export_web``: a deployment as a static folder, which a page or Node runs with onnxruntime-web or onnxruntime-node.

The base goes unmodified, behind the same small graph as for other hosts of several graphs. Large files are split.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from adalink.export.pipeline.stages import BASE, FRONT, TASKS, Progress, Stages
from adalink.export.pipeline.tasks import INPUTS
from adalink.export.tracing.external_data import is_external, place_of
from adalink.export.web.check import expected_results
from adalink.export.web.libraries import copy_libraries
from adalink.export.web.pieces import PIECE_BYTES, split_file
from adalink.export.web.place import INDEX, PAGE, check_place
from adalink.export.web.tokenizer import rewrite_tokenizer
from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.adapter_spec import ACTIVATIONS
from adalink.runtime.storage.atomic import write_through
from adalink.runtime.storage.atomic_folder import replace_folder

_FORMAT = 1
# A browser has 4 GB for a page's memory of WebAssembly, and loading takes some of it twice.
MOST_BYTES = 1_800_000_000


@dataclass(frozen=True)
class WebFolder:
    """A folder that was written.

    Attributes:
        variant: the variant whose graph it has.
        tasks: its tasks.
        download_bytes: bytes of the model that a page loads.
        libraries: the JavaScript libraries that lie in it.
        not_carried: generation defaults that a page does not apply.
        left_out: parts of tasks that stay in the kit, by task.
    """

    variant: str
    tasks: tuple[str, ...]
    download_bytes: int
    libraries: tuple[str, ...]
    not_carried: dict[str, object]
    left_out: dict[str, tuple[str, ...]]


def export_web(
    deployment: str | Path,
    out: str | Path,
    *,
    variant: str | None = None,
    tasks: Sequence[str] | None = None,
    libraries: str | Path | None = None,
    replace: bool = False,
    progress: Progress = lambda line, done: None,
) -> WebFolder:
    """Write a folder for browsers and Node.

    Args:
        deployment: the deployment folder.
        out: the folder to write.
        variant: the base variant, one for ``onnxruntime-cpu``; by default as ``Deployment.open`` chooses.
        tasks: the tasks; all by default.
        libraries: a ``node_modules`` folder with onnxruntime-web and @huggingface/tokenizers, whose files are copied.
        replace: whether such a folder may be there already.
        progress: called with a line, and how far it is from 0 to 1.

    Raises:
        BackendError: there is no such variant.
        ConfigError: the base or a task cannot go there, or a library is missing; says why.
        DeploymentError: no deployment, or (``IntegrityError``) a damaged one; or the place is taken.
        GraphError: the graph of the tasks does not compute them.
        UnknownTaskError: a task is not deployed.
    """
    deployment, out = Path(deployment), Path(out)
    check_place(out, replace=replace)
    stages = Stages(deployment, "a browser", variant=variant, tasks=tasks)
    if stages.base.embedding_dtype != "float32":
        raise ConfigError(
            f"base {stages.base.name} takes {stages.base.embedding_dtype}, which JavaScript has no numbers for: export "
            "it with --dtype fp32, and --quantize int4 for a small download"
        )
    with replace_folder(out.resolve(), f"folder {out}") as staging:
        stages.write(staging, progress)
        progress("asking the kit for what it gives", None)
        check = expected_results(deployment, stages.variant, stages.adapters)
        rewrite_tokenizer(staging / stages.tokenizer)
        size = _check_size(stages, staging)
        copied = copy_libraries(Path(libraries), staging) if libraries is not None else ()
        for path in PAGE.iterdir():
            shutil.copyfile(path, staging / path.name)
        index = _index(stages, staging, copied)
        index["check"] = check
        write_through(staging / INDEX, json.dumps(index, indent=1).encode() + b"\n")
    return WebFolder(
        variant=stages.variant,
        tasks=tuple(stages.adapters),
        download_bytes=size,
        libraries=copied,
        not_carried={} if stages.base.generation is None else stages.base.generation.applied(),
        left_out=stages.left_out,
    )


def _index(stages: Stages, staging: Path, libraries: Sequence[str]) -> dict[str, object]:
    """What ``web.json`` says, but for the check; files are split on the way."""
    base = stages.base
    cache = base.cache
    assert cache is not None
    tasks = {task: f"{TASKS}/{task}.safetensors" for task in stages.adapters}
    data = {name: _data_files(staging / name) for name in (FRONT, stages.graph)}
    names = dict.fromkeys((*chain(data, *data.values()), stages.tokenizer, BASE, *tasks.values()))
    keys = [f"{layer}.{kind}" for layer in range(cache.layers) for kind in ("key", "value")]
    caches = {"pasts": [f"past_key_values.{key}" for key in keys], "presents": [f"present.{key}" for key in keys]}
    activations = [ACTIVATIONS.index(name) for name in stages.activations]
    front = {"activations": activations, "fingerprint": base.fingerprint, "inputs": INPUTS, "width": base.hidden_size}
    return {
        "format": _FORMAT,
        "name": base.name,
        "vocabulary": base.vocab_size,
        "positions": base.max_positions or 1 << 30,
        "ends": base.eos_token_ids,
        "tokenizer": stages.tokenizer,
        "front": {"graph": FRONT, "data": data[FRONT], **front},
        "base": {
            "graph": stages.graph,
            "data": data[stages.graph],
            "inputs": stages.inputs,
            "cache": {**caches, "heads": cache.kv_heads, "size": cache.head_dim},
        },
        "plain": BASE,
        "tasks": tasks,
        "libraries": libraries,
        "files": {name: split_file(staging, name, PIECE_BYTES) for name in names},
    }


def _data_files(graph: Path) -> list[str]:
    """Names of the files that hold a graph's weights."""
    import onnx

    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    return sorted({place_of(tensor)[0] for tensor in tensors if is_external(tensor)})


def _check_size(stages: Stages, staging: Path) -> int:
    """Bytes of the model; raises ``ConfigError`` if a browser has no memory for them."""
    size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise ConfigError(
            f"variant {stages.variant} of base {stages.base.name} has {size / 1e6:.0f} MB, and a page takes "
            f"{MOST_BYTES / 1e6:.0f} MB at most: export the base with --quantize int4 and name that variant"
        )
    return size
