"""The levels of a quantised variant: its weights, its engine without rounding, as it is deployed, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from adalink.runtime.deployment import Deployment
from adalink.runtime.engine import Backend
from adalink.runtime.options import OpenOptions
from adalink.tools.parity.checks.accuracy import measure_accuracy
from adalink.tools.parity.checks.batches import STEPS
from adalink.tools.parity.checks.quantization import check_activations, check_cost, matrices_of, measure_cost, text_rows
from adalink.tools.parity.checks.scheduler import JoinedRows
from adalink.tools.parity.checks.swap import mixed_tasks
from adalink.tools.parity.engines.float32_gguf import Float32Gguf
from adalink.tools.parity.engines.shared_engines import SharedEngines
from adalink.tools.parity.engines.unrounded_backend import ExactActivations
from adalink.tools.parity.inputs.collect import ParityInputs
from adalink.tools.parity.levels import Run, check_base_and_tasks

if TYPE_CHECKING:
    from adalink.training.data.rows import TrainingRow

# Of rows that join a running batch. Less than 1 is no error: what rounded activations give depends on the batch.
_AS_ALONE = "rows with the tokens of each alone"


@dataclass(frozen=True)
class CostOptions:
    """What the cost of quantising is measured on.

    Attributes:
        text: text; the prompts by default.
        max_perplexity_increase: limit on the perplexity, in percent of float32's.
        task_rows: rows by task, for exact match.
        quick: fewer rows of the text.
    """

    text: str | None
    max_perplexity_increase: float | None
    task_rows: Mapping[str, list[TrainingRow]]
    quick: bool


def check_quantized(run: Run, inputs: ParityInputs, options: CostOptions) -> None:
    """All levels of a quantised variant that its engine takes part in, and the table of costs.

    The run's deployment is closed, and opened again for the last levels.
    """
    deployment, reference, quantization = run.deployment, run.reference, run.deployment.variant.quantization
    assert quantization is not None
    run.progress("quantised weights against the model's")
    engines, form = run.engine
    if deployment.variant.is_gguf:
        run.report.checks += reference.take_file(deployment.path / deployment.variant.graph, quantization)
        backend: Backend = Float32Gguf(engines.inner)
    else:
        run.report.checks += reference.quantize(matrices_of(deployment), quantization)
        backend = ExactActivations(engines.inner)
    # One engine at a time: with its weights in the layout of the kernels, each is as large as its graph.
    deployment.close()
    engines.close()
    with (
        SharedEngines(backend) as exact,
        Deployment(deployment.path, deployment.manifest, exact, OpenOptions(form)) as unrounded,
    ):
        check_base_and_tasks(replace(run, deployment=unrounded, engine=(exact, form)), inputs)
    run.progress("the engine as deployed, with rounded activations")
    with Deployment(deployment.path, deployment.manifest, engines, OpenOptions(form)) as deployed:
        run.report.checks += check_activations(
            deployed, reference, run.folders, inputs.rows, inputs.texts, run.engine, STEPS
        )
        run.progress("the cost of quantising")
        _measure_costs(replace(run, deployment=deployed), inputs, options)


def _measure_costs(run: Run, inputs: ParityInputs, options: CostOptions) -> None:
    report, deployment, reference = run.report, run.deployment, run.reference
    rows = inputs.rows if options.text is None else text_rows(options.text, deployment, options.quick)
    report.cost = measure_cost(deployment, reference, rows)
    if inputs.texts is not None:
        joined = JoinedRows(deployment, run.engine, inputs.texts, mixed_tasks(deployment), compare_alone=True)
        report.cost[_AS_ALONE] = {"float32": np.nan, "weights": np.nan, "deployed": joined.agreement}
    if options.max_perplexity_increase is not None:
        report.checks.append(check_cost(report.cost, options.max_perplexity_increase))
    for name, examples in options.task_rows.items():
        report.cost[f"exact match of {name}"] = measure_accuracy(
            deployment, reference, name, run.folders[name], examples, run.progress
        )
