"""``verify``: all levels of parity, in order (docs/concepts/parity.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from adalink.export.base.request import check_unchanged, weight_stamps
from adalink.runtime.backends import open_backend
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import RequestError
from adalink.runtime.options import OpenOptions
from adalink.runtime.rows.source import RowSource
from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.known_tasks import check_tasks
from adalink.runtime.storage.manifest import Base, Manifest
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.variants import choose_variant, variant_digest
from adalink.runtime.storage.verification_cache import verify_variant
from adalink.tools.common.environment import available_cores
from adalink.tools.parity.checks.adapter import check_table
from adalink.tools.parity.checks.swap import check_swaps
from adalink.tools.parity.engines.shared_engines import SharedEngines
from adalink.tools.parity.inputs.collect import collect_inputs
from adalink.tools.parity.levels import Run, check_adapters, check_base_and_tasks
from adalink.tools.parity.quantized_levels import CostOptions, check_quantized
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.report import Report
from adalink.tools.parity.torch_threads import torch_threads

if TYPE_CHECKING:
    from adalink.training.data.rows import TrainingRow

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """The engine to verify, and how thoroughly.

    Attributes:
        backend: the engine's backend.
        variant: variant of the base; see ``Deployment.open``.
        threads: threads of the engine.
        quick: fewer prompts.
        text: text to measure the cost of quantising on; the prompts by default.
        max_perplexity_increase: limit on the perplexity of a quantised base, in percent of float32's.
        task_rows: files of prompts and completions by task, for exact match with a quantised base.
        assume_pretokenizer: see ``load_tokenizer``.
    """

    backend: str = "onnxruntime-cpu"
    variant: str | None = None
    threads: int | None = None
    quick: bool = False
    text: str | None = None
    max_perplexity_increase: float | None = None
    task_rows: Mapping[str, RowSource | Path] = field(default_factory=dict)
    assume_pretokenizer: str | None = None


def verify(
    path: Path,
    against: str,
    adapters: Mapping[str, Path],
    options: VerifyOptions | None = None,
    *,
    progress: Progress = lambda line: None,
) -> Report:
    """Compare a deployment with PyTorch.

    Args:
        path: the deployment.
        against: the base model: folder, GGUF file or hub id.
        adapters: adapter folder of each task; by default the copy beside its graph.
        options: the engine to verify, and how thoroughly.
        progress: called with a line at each step.

    Raises:
        AdaLinkError: the deployment or the model cannot be used at all. Any other fault is a failed check.
    """
    options = options or VerifyOptions()
    manifest = read_manifest(path)
    engines = SharedEngines(open_backend(options.backend, options.threads))
    form = choose_variant(manifest, engines.name, options.variant)
    manifest, left_out = _without_other_prefixes(manifest, form, engines.name)
    if manifest.variants[form].quantization is None:
        _refuse_costs(form, options)
    folders = _adapter_folders(path, manifest, adapters)
    tested = _read_task_rows(manifest, form, options.task_rows)
    progress("reading the deployment's files")
    verified = verify_variant(path, manifest, manifest.variants[form], full_check=True)
    sources = {name: read_adapter(folder) for name, folder in folders.items()}
    # Before the engine: PyTorch needs memory for the whole model while it is loaded, and for a piece of it afterwards.
    progress(f"loading {manifest.base.name} in PyTorch, float32 and float64")
    stamps = weight_stamps(against)  # every row reads the files
    reference = Reference(against, _with_weights(manifest, form), options.assume_pretokenizer)
    report = Report(skipped=left_out)
    with torch_threads(available_cores() // 2), engines:
        progress("opening the deployment")
        with Deployment(path, manifest, engines, OpenOptions(form, full_check=True)) as deployment:
            verified.check_unchanged(undo=deployment.close)
            run = Run(report, deployment, reference, folders, (engines, form), progress)
            check_adapters(run, sources)
            report.checks += reference.file_checks
            progress("embedding table and tokenizer")
            report.checks.append(check_table(deployment, reference))
            inputs = collect_inputs(report, deployment, reference, against, options.quick, progress)
            if deployment.variant.quantization is None:
                check_base_and_tasks(run, inputs)
            else:
                costs = CostOptions(options.text, options.max_perplexity_increase, tested, options.quick)
                check_quantized(run, inputs, costs)
            check_unchanged(stamps)
    # Without an engine here: each fresh process opens one.
    progress(f"switching between {len(folders)} tasks in fresh processes")
    checks, report.receipt = check_swaps(deployment, engines.name, form, options.threads, inputs.rows[0])
    report.checks += checks
    return report


def _without_other_prefixes(manifest: Manifest, form: str, backend: str) -> tuple[Manifest, list[str]]:
    """The manifest without tasks whose KV prefix this engine refuses, and why each is left out."""
    digest, reasons = variant_digest(manifest, manifest.variants[form]), {}
    for name, task in manifest.tasks.items():
        if task.kv_prefix is not None and backend != "onnxruntime-cpu":
            reasons[name] = f"{backend} takes no KV prefix, and says so"
        elif task.kv_prefix is not None and task.kv_prefix.variant_digest not in ("", digest):
            reasons[name] = f"another variant than {form!r} computed its KV prefix; verify it with that"
    tasks = {name: task for name, task in manifest.tasks.items() if name not in reasons}
    left_out = [f"task {name}: {reason}" for name, reason in sorted(reasons.items())]
    return msgspec.structs.replace(manifest, tasks=tasks), left_out


def _with_weights(manifest: Manifest, form: str) -> Base:
    """The base contract, with the digest of a variant's weights where the variant has its own."""
    own = manifest.variants[form].weights_digest
    return msgspec.structs.replace(manifest.base, weights_digest=own) if own else manifest.base


def _refuse_costs(form: str, options: VerifyOptions) -> None:
    """Refuse options for quantised variants alone; raises ``RequestError``."""
    for option, value in (
        ("--max-perplexity-increase", options.max_perplexity_increase),
        ("--text", options.text),
    ):
        if value is not None:
            raise RequestError(
                f"variant {form!r} is not quantised, so no perplexity is lost: leave {option} out, or choose a "
                "quantised variant with --variant"
            )


def _adapter_folders(path: Path, manifest: Manifest, adapters: Mapping[str, Path]) -> dict[str, Path]:
    check_tasks(adapters, manifest.tasks)
    return {name: adapters.get(name, (path / task.config).parent) for name, task in sorted(manifest.tasks.items())}


def _read_task_rows(
    manifest: Manifest, form: str, files: Mapping[str, RowSource | Path]
) -> dict[str, list[TrainingRow]]:
    """The rows of each task; ``form`` is the variant's name, for messages."""
    from adalink.training.data.rows import read_rows

    if files and manifest.variants[form].quantization is None:
        raise RequestError(
            f"variant {form!r} is not quantised, so no accuracy is lost: leave --rows out, or choose a "
            "quantised variant with --variant"
        )
    if files and (manifest.base.kind == "encoder" or manifest.base.tokenizer is None):
        raise RequestError("exact match needs a base that generates, with its tokenizer: leave --rows out")
    check_tasks(files, manifest.tasks)
    for name in files:
        task = manifest.tasks[name]
        base, has = manifest.base, None
        if task.input == "ids":
            has = "a table of token ids"
        elif task.soft_tokens and base.kind == "encoder-decoder":
            has = "a soft prompt before an encoder-decoder"
        elif task.kv_prefix is not None:
            has = "a KV prefix"
        elif base.vision is None and task.modalities != ("text",):
            has = "weights for embeddings of other modalities"
        if has is not None:
            raise RequestError(
                f"exact match of {name} cannot be measured: it has {has}, which adalink.training does not attach; "
                "leave its --rows out"
            )
    return {name: read_rows(path) for name, path in files.items()}
