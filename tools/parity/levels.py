"""The levels of a parity run that its engine takes part in, but for those of quantised variants, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adalink.runtime.deployment import Deployment
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.integrity import read_graph
from adalink.runtime.storage.tokenizer_digest import deployed_tokenizer_digest
from adalink.tools.parity.checks.adapter import (
    check_contract,
    check_fold,
    check_kv_prefix,
    check_soft_prompt,
    check_vocabulary,
    check_weights,
    through_bank,
    through_graph,
)
from adalink.tools.parity.checks.batches import STEPS, Batch
from adalink.tools.parity.checks.defaults import check_defaults
from adalink.tools.parity.checks.generation import Generator
from adalink.tools.parity.checks.head import check_head, is_head_alone
from adalink.tools.parity.checks.kv_cache import check_kv_caches
from adalink.tools.parity.checks.labels import check_labels
from adalink.tools.parity.checks.outputs import Comparison, Rows, check_control, compare_outputs
from adalink.tools.parity.checks.pooling import check_pooling, check_pooling_settings
from adalink.tools.parity.checks.prefix_cache import CachedRows
from adalink.tools.parity.checks.profile import check_decoder_profile_limits, check_encoder_profile_limits
from adalink.tools.parity.checks.scheduler import JoinedRows
from adalink.tools.parity.checks.swap import check_mixed_outputs, mixed_tasks
from adalink.tools.parity.engines.shared_engines import SharedEngines
from adalink.tools.parity.inputs.collect import ParityInputs
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.report import Report

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A parity run: the report, what is compared, and with what.

    Attributes:
        report: takes the checks.
        deployment: the deployment to verify.
        reference: PyTorch.
        folders: adapter folder of each task.
        engine: backend and variant, to open the deployment otherwise.
        progress: called with a line at each step.
    """

    report: Report
    deployment: Deployment
    reference: Reference
    folders: Mapping[str, Path]
    engine: tuple[SharedEngines, str]
    progress: Progress

    def folder(self, task: str | None) -> Path | None:
        """Adapter folder of a task; ``None`` for the base."""
        return None if task is None else self.folders[task]


def check_adapters(run: Run, sources: Mapping[str, Adapter]) -> None:
    """Level 1."""
    report, deployment, manifest = run.report, run.deployment, run.deployment.manifest
    for name, adapter in sources.items():
        run.progress(f"task {name}: every row of the vocabulary, every weight")
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
        if adapter.config.kv_prefix is not None:
            report.checks.append(check_kv_prefix(name, deployment, adapter))
        if task.fold is not None:
            report.checks.append(check_fold(name, task.fold.kind, deployment, adapter))


def check_base_and_tasks(run: Run, inputs: ParityInputs) -> None:
    """Levels 2, 3, 5 and 7, the mixed batches of level 4, and level 6."""
    if inputs.texts is not None:
        check_defaults(run.report, run.deployment, run.reference, inputs.rows)
    check_pooling_settings(run.report, run.deployment, run.reference)
    generated = None if inputs.texts is None else _Generated(run, inputs, inputs.texts)
    compared: dict[str | None, Comparison] = {}
    for task in (None, *run.deployment.tasks):
        with run.reference.adapted(run.folder(task)):
            compared[task] = _check_task(run, inputs, task, generated)
    run.progress("one batch of mixed tasks against single rows")
    run.report.checks += check_mixed_outputs(run.deployment, inputs.rows, compared)
    if generated is not None:
        generated.check_mixed(run.report)
    _check_profile(run, generated, compared)
    _check_kv_caches(run, inputs)
    if generated is not None:
        generated.generator.close()


class _Generated:
    """What is generated in batches, under all tasks.

    Attributes:
        generator: the deployment with recorded steps.
    """

    def __init__(self, run: Run, inputs: ParityInputs, texts: Sequence[str]) -> None:
        self.generator = Generator(run.deployment, *run.engine)
        run.progress("rows that join a running batch")
        tasks = mixed_tasks(run.deployment)
        self._joined = JoinedRows(run.deployment, run.engine, texts, tasks)
        self._cached = CachedRows(run.deployment, run.engine, texts, [None, *run.deployment.tasks])
        self._batches = [Batch(self.generator, texts, tasks)]
        if (images := inputs.generated_images) is not None:
            self._batches.append(Batch(self.generator, images.prompts, tasks, images))

    def check(self, run: Run, task: str | None, typical: Mapping[bool, float]) -> None:
        """All rows of a task, whose adapter is attached; ``typical`` is the noise without images and with them."""
        label = _label(task)
        for batch in self._batches:
            run.progress(f"{label}: {STEPS} greedy steps{' after images' if batch.has_images else ''}")
            run.report.checks += batch.check(label, task, run.reference, typical[batch.has_images])
        self._joined.judge(task, run.reference, self.generator, typical[False])
        self._cached.judge(task, run.reference, self.generator, typical[False])

    def check_mixed(self, report: Report) -> None:
        """The rows of mixed batches, once every task has been checked."""
        report.checks += self._joined.checks() + self._cached.checks()
        for batch in self._batches:
            report.checks += batch.check_mixed()
            if not batch.ends_apart:
                images = " with images" if batch.has_images else ""
                report.skipped.append(
                    f"rows{images} that leave a batch one after another: none did before the last step"
                )


def _check_task(run: Run, inputs: ParityInputs, task: str | None, generated: _Generated | None) -> Comparison:
    """Outputs and generation of one task, whose adapter is attached; ``None`` is the base."""
    report, deployment, reference, label = run.report, run.deployment, run.reference, _label(task)
    kinds = _kinds_of_rows(inputs)
    compared: dict[str, Comparison] = {}
    for kind in kinds:
        run.progress(f"{label}: outputs on {len(kind.rows.ids)} {kind.title}")
        prefix = f"{label}/{kind.name}" if kind.name else label
        compared[kind.name] = compare_outputs(prefix, deployment, reference, task, kind.rows)
        report.checks += compared[kind.name].checks
        if not kind.name:
            report.checks += check_pooling(label, task, deployment, reference, inputs.pooled, compared[""])
            report.checks += check_head(task, run.folders, deployment, reference, inputs.pooled, compared[""])
    if generated is not None:
        typical = {name == _IMAGES: compared[name].typical["logits"] for name in ("", _IMAGES) if name in compared}
        generated.check(run, task, typical)
        report.checks += check_labels(task, deployment, reference, inputs.texts, typical[False])
    if task is not None and not is_head_alone(deployment.manifest.tasks[task]):
        takes_text = "text" in deployment.manifest.tasks[task].modalities
        for kind in kinds:
            if takes_text or not kind.is_text:
                name = f"{task}/{kind.name}" if kind.name else task
                report.checks += check_control(name, deployment, task, kind.rows, compared[kind.name].limits)
    return compared[""]


@dataclass(frozen=True)
class _KindOfRows:
    """Rows that are compared together; ``name`` is empty for prompts of text alone."""

    name: str
    title: str
    rows: Rows
    is_text: bool = field(default=True)


_IMAGES = "images"


def _kinds_of_rows(inputs: ParityInputs) -> list[_KindOfRows]:
    kinds = [_KindOfRows("", "prompts", Rows(inputs.rows))]
    if (images := inputs.image_prompts) is not None:
        kinds.append(_KindOfRows(_IMAGES, "prompts with images", Rows(images.rows, images), is_text=False))
    return kinds + [
        _KindOfRows(kind.name, f"rows: {kind.name}", Rows(kind.rows, labels=kind.labels), kind.is_text)
        for kind in inputs.labelled
    ]


def _check_kv_caches(run: Run, inputs: ParityInputs) -> None:
    """Graphs of the variant with another KV cache."""
    report, deployment = run.report, run.deployment
    if not deployment.variant.kv_cache_graphs:
        return
    run.progress("KV caches in another dtype")
    report.checks += check_kv_caches(deployment, run.reference, run.folders, inputs.rows, run.engine[0].inner)
    for name, task in sorted(deployment.manifest.tasks.items()):
        if task.kv_prefix is not None:
            report.skipped.append(f"KV caches in another dtype under {name}: they take no KV prefix, and say so")
        elif task.soft_tokens:
            report.skipped.append(f"KV caches in another dtype under {name}: a soft prompt has keys and values too")


def _check_profile(run: Run, generated: _Generated | None, compared: Mapping[str | None, Comparison]) -> None:
    """Level 6."""
    report, deployment, profile = run.report, run.deployment, run.deployment.profile
    if profile is None:
        return
    run.progress(f"every task at the limits of the engine's profile ({profile})")
    if generated is not None:
        report.checks += check_decoder_profile_limits(
            deployment, generated.generator, run.reference, run.folders, compared, profile
        )
    elif deployment.manifest.base.kind == "encoder":
        report.checks += check_encoder_profile_limits(deployment, run.reference, run.folders, compared, profile)
    else:
        report.skipped.append("the limits of the profile: a decoder is swept by what it generates from texts")


def _label(task: str | None) -> str:
    return "base" if task is None else f"task/{task}"
