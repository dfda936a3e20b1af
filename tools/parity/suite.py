"""``verify``: all levels of parity, in order (docs/concepts/parity.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adalink.runtime.backends import open_backend
from adalink.runtime.deployment import Deployment
from adalink.runtime.engine import Backend
from adalink.runtime.errors import RequestError
from adalink.runtime.options import OpenOptions
from adalink.runtime.rows.source import RowSource
from adalink.runtime.storage.adapter import Adapter, read_adapter
from adalink.runtime.storage.integrity import read_graph
from adalink.runtime.storage.known_tasks import check_tasks
from adalink.runtime.storage.tokenizer_digest import deployed_tokenizer_digest
from adalink.runtime.storage.variants import choose_variant
from adalink.tools.common.environment import available_cores
from adalink.tools.parity.check_accuracy import measure_accuracy
from adalink.tools.parity.check_adapter import (
    check_contract,
    check_fold,
    check_soft_prompt,
    check_table,
    check_vocabulary,
    check_weights,
    through_bank,
    through_graph,
)
from adalink.tools.parity.check_batches import STEPS, Batch
from adalink.tools.parity.check_defaults import check_defaults
from adalink.tools.parity.check_generation import Generator
from adalink.tools.parity.check_head import check_head, is_head_alone
from adalink.tools.parity.check_kv_cache import check_kv_caches
from adalink.tools.parity.check_labels import check_labels
from adalink.tools.parity.check_outputs import Comparison, check_control, compare_outputs
from adalink.tools.parity.check_pooling import check_pooling, check_pooling_settings
from adalink.tools.parity.check_profile import check_decoder_profile_limits, check_encoder_profile_limits
from adalink.tools.parity.check_quantization import check_activations, check_cost, matrices_of, measure_cost, text_rows
from adalink.tools.parity.check_scheduler import JoinedRows
from adalink.tools.parity.check_swap import check_mixed_outputs, check_swaps, mixed_tasks
from adalink.tools.parity.inputs import ParityInputs, collect_inputs
from adalink.tools.parity.reference import Reference
from adalink.tools.parity.report import Report
from adalink.tools.parity.torch_threads import torch_threads
from adalink.tools.parity.unrounded_backend import ExactActivations

if TYPE_CHECKING:
    from adalink.training.data.rows import TrainingRow

Progress = Callable[[str], None]

# Of rows that join a running batch. Less than 1 is no error: what rounded activations give depends on the batch.
_AS_ALONE = "rows with the tokens of each alone"


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
    backend, variant, threads, quick = options.backend, options.variant, options.threads, options.quick
    progress("opening the deployment")
    with (
        torch_threads(available_cores() // 2),
        Deployment.open(path, backend, variant=variant, threads=threads, full_check=True) as deployment,
    ):
        form = choose_variant(deployment.manifest, backend, variant)
        quantization = deployment.variant.quantization
        if quantization is None:
            _refuse_costs(form, options)
        folders = _adapter_folders(deployment, adapters)
        tested = _read_task_rows(deployment, form, options.task_rows)
        sources = {name: read_adapter(folder) for name, folder in folders.items()}
        progress(f"loading {deployment.manifest.base.name} in PyTorch, float32 and float64")
        reference = Reference(against, deployment.manifest.base, options.assume_pretokenizer)
        report = Report()
        _check_adapters(report, deployment, sources, progress)
        report.checks += reference.file_checks
        progress("embedding table and tokenizer")
        report.checks.append(check_table(deployment, reference))
        inputs = collect_inputs(report, deployment, reference, against, quick, progress)
        opened: Backend = open_backend(backend, threads)
        if quantization is None:
            _check_outputs(report, deployment, reference, folders, inputs, (opened, form), progress)
            report.checks += check_kv_caches(deployment, reference, folders, inputs.rows, opened)
        else:
            progress("quantised weights against the model's")
            report.checks += reference.quantize(matrices_of(deployment), quantization)
            exact = ExactActivations(opened)
            with Deployment(deployment.path, deployment.manifest, exact, OpenOptions(form)) as unrounded:
                _check_outputs(report, unrounded, reference, folders, inputs, (exact, form), progress)
            report.checks += check_kv_caches(deployment, reference, folders, inputs.rows, exact)
            progress("the engine as deployed, with rounded activations")
            report.checks += check_activations(
                deployment, reference, folders, inputs.rows, inputs.texts, (opened, form), STEPS
            )
            progress("the cost of quantising")
            rows = inputs.rows if options.text is None else text_rows(options.text, deployment, quick)
            report.cost = measure_cost(deployment, reference, rows)
            if inputs.texts is not None:
                tasks = mixed_tasks(deployment)
                rows_joined = JoinedRows(deployment, (opened, form), inputs.texts, tasks, compare_alone=True)
                report.cost[_AS_ALONE] = {"float32": np.nan, "weights": np.nan, "deployed": rows_joined.agreement}
            if options.max_perplexity_increase is not None:
                report.checks.append(check_cost(report.cost, options.max_perplexity_increase))
            for name, examples in tested.items():
                report.cost[f"exact match of {name}"] = measure_accuracy(
                    deployment, reference, name, folders[name], examples, progress
                )
        progress(f"switching between {len(deployment.tasks)} tasks in fresh processes")
        checks, report.receipt = check_swaps(deployment, backend, form, threads, inputs.rows[0])
        report.checks += checks
    return report


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


def _adapter_folders(deployment: Deployment, adapters: Mapping[str, Path]) -> dict[str, Path]:
    check_tasks(adapters, deployment.tasks)
    copies = {name: (deployment.path / task.config).parent for name, task in deployment.manifest.tasks.items()}
    return {name: adapters.get(name, copies[name]) for name in deployment.tasks}


def _read_task_rows(
    deployment: Deployment, form: str, files: Mapping[str, RowSource | Path]
) -> dict[str, list[TrainingRow]]:
    """The rows of each task; ``form`` is the variant's name, for messages."""
    from adalink.training.data.rows import read_rows

    if files and deployment.variant.quantization is None:
        raise RequestError(
            f"variant {form!r} is not quantised, so no accuracy is lost: leave --rows out, or choose a "
            "quantised variant with --variant"
        )
    if files and (deployment.manifest.base.kind == "encoder" or deployment.manifest.base.tokenizer is None):
        raise RequestError("exact match needs a base that generates, with its tokenizer: leave --rows out")
    check_tasks(files, deployment.tasks)
    for name in files:
        task = deployment.manifest.tasks[name]
        base, has = deployment.manifest.base, None
        if task.input == "ids":
            has = "a table of token ids"
        elif task.soft_tokens and base.kind == "encoder-decoder":
            has = "a soft prompt before an encoder-decoder"
        elif base.vision is None and task.modalities != ("text",):
            has = "weights for embeddings of other modalities"
        if has is not None:
            raise RequestError(
                f"exact match of {name} cannot be measured: it has {has}, which adalink.training does not attach; "
                "leave its --rows out"
            )
    return {name: read_rows(path) for name, path in files.items()}


def _check_adapters(report: Report, deployment: Deployment, sources: Mapping[str, Adapter], progress: Progress) -> None:
    """Level 1."""
    manifest = deployment.manifest
    for name, adapter in sources.items():
        progress(f"task {name}: every row of the vocabulary, every weight")
        task, dtype = manifest.tasks[name], manifest.base.embedding_dtype
        digest = deployed_tokenizer_digest(deployment.path, manifest)
        report.checks.append(check_contract(name, task, adapter, digest))
        graph = read_graph(deployment.path, manifest, task.graph)
        ways = {"bank": through_bank(deployment, name), "graph": through_graph(graph, adapter.config, dtype)}
        for way, adapt in ways.items():
            report.checks.append(check_vocabulary(name, way, adapt, deployment, adapter))
            if task.input == "embeddings":  # a table has no inner sum that could hide a weight
                report.checks.append(check_weights(name, way, adapt, adapter, dtype))
        if adapter.config.soft_tokens:
            report.checks.append(check_soft_prompt(name, graph, deployment, adapter))
        if task.fold is not None:
            report.checks.append(check_fold(name, task.fold.kind, deployment, adapter))


def _check_outputs(
    report: Report,
    deployment: Deployment,
    reference: Reference,
    folders: Mapping[str, Path],
    inputs: ParityInputs,
    engine: tuple[Backend, str],
    progress: Progress,
) -> None:
    """Levels 2, 3, 5 and 7, the mixed batches of level 4, and level 6."""
    rows, texts, image_prompts = inputs.rows, inputs.texts, inputs.image_prompts
    if texts is not None:
        check_defaults(report, deployment, reference, rows)
    check_pooling_settings(report, deployment, reference)
    compared: dict[str | None, Comparison] = {}
    compared_images: dict[str | None, Comparison] = {}
    compared_kinds: dict[tuple[str, str | None], Comparison] = {}
    generator = None if texts is None else Generator(deployment, *engine)
    batches: list[Batch] = []
    joined: JoinedRows | None = None
    if generator is not None and texts is not None:
        progress("rows that join a running batch")
        joined = JoinedRows(deployment, engine, texts, mixed_tasks(deployment))
        batches.append(Batch(generator, texts, mixed_tasks(deployment)))
        if (generated := inputs.generated_images) is not None:
            batches.append(Batch(generator, generated.prompts, mixed_tasks(deployment), generated))
    for task in (None, *deployment.tasks):
        label = "base" if task is None else f"task/{task}"
        progress(f"{label}: outputs on {len(rows)} prompts")
        with reference.adapted(None if task is None else folders[task]):
            compared[task] = comparison = compare_outputs(label, deployment, reference, task, rows)
            report.checks += comparison.checks
            report.checks += check_pooling(label, task, deployment, reference, inputs.pooled, comparison)
            report.checks += check_head(task, folders, deployment, reference, inputs.pooled, comparison)
            if image_prompts is not None:
                progress(f"{label}: outputs on {len(image_prompts.rows)} prompts with images")
                compared_images[task] = compare_outputs(
                    f"{label}/images", deployment, reference, task, image_prompts.rows, image_prompts
                )
                report.checks += compared_images[task].checks
            for kind in inputs.labelled:
                progress(f"{label}: outputs on {len(kind.rows)} rows: {kind.name}")
                compared_kinds[kind.name, task] = compare_outputs(
                    f"{label}/{kind.name}", deployment, reference, task, kind.rows, labels=kind.labels
                )
                report.checks += compared_kinds[kind.name, task].checks
            for batch in batches:
                progress(f"{label}: {STEPS} greedy steps{' after images' if batch.has_images else ''}")
                typical = (compared_images[task] if batch.has_images else comparison).typical["logits"]
                report.checks += batch.check(label, task, reference, typical)
            if texts is not None:
                report.checks += check_labels(task, deployment, reference, texts, comparison.typical["logits"])
            if joined is not None and generator is not None:
                joined.judge(task, reference, generator, comparison.typical["logits"])
    for task in deployment.tasks:
        if is_head_alone(deployment.manifest.tasks[task]):
            continue
        if takes_text := "text" in deployment.manifest.tasks[task].modalities:
            report.checks += check_control(task, compared[None], compared[task])
        for kind in (kind for kind in inputs.labelled if takes_text or not kind.is_text):
            base_output, output = compared_kinds[kind.name, None], compared_kinds[kind.name, task]
            report.checks += check_control(f"{task}/{kind.name}", base_output, output)
        if compared_images:
            report.checks += check_control(f"{task}/images", compared_images[None], compared_images[task])
    progress("one batch of mixed tasks against single rows")
    report.checks += check_mixed_outputs(deployment, rows, compared)
    report.checks += [] if joined is None else joined.checks()
    for batch in batches:
        report.checks += batch.check_mixed()
        if not batch.ends_apart:
            images = " with images" if batch.has_images else ""
            report.skipped.append(f"rows{images} that leave a batch one after another: none did before the last step")
    if (profile := deployment.profile) is not None:
        progress(f"every task at the limits of the engine's profile ({profile})")
        if generator is not None:
            report.checks += check_decoder_profile_limits(deployment, generator, reference, folders, compared, profile)
        elif deployment.manifest.base.kind == "encoder":
            report.checks += check_encoder_profile_limits(deployment, reference, folders, compared, profile)
        else:
            report.skipped.append("the limits of the profile: a decoder is swept by what it generates from texts")
    if generator is not None:
        generator.close()
