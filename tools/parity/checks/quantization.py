"""The cost of quantising, apart from errors: coarser weights, rounded activations, and their effect on predictions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.deployment import Deployment
from adalink.runtime.engine import Backend
from adalink.runtime.errors import DataError, RequestError
from adalink.tools.parity.checks.adapter import as_numbers
from adalink.tools.parity.checks.generation import Generator, check_generation, judge
from adalink.tools.parity.checks.outputs import Rows, compare_outputs, decoder_row, log_softmax
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.reference.noise_floor import largest_deviations, widened
from adalink.tools.parity.reference.quantized_weights import Matrix, read_matrices
from adalink.tools.parity.report import Check, at_most

# Tokens of a text that are run at once, and how many such rows.
ROW_TOKENS = 256
_TEXT_ROWS, _QUICK_TEXT_ROWS = 16, 2

Cost = dict[str, dict[str, float]]


def matrices_of(deployment: Deployment) -> list[Matrix]:
    """The quantised matrices of all graphs of the variant that is open."""
    graphs = [name for name in (deployment.variant.graph, deployment.variant.decoder_graph) if name]
    return [matrix for name in graphs for matrix in read_matrices(deployment.path / name)]


def check_activations(
    deployment: Deployment,
    reference: Reference,
    folders: Mapping[str, Path],
    rows: list[list[int]],
    texts: list[str] | None,
    engine: tuple[Backend, str],
    steps: int,
) -> list[Check]:
    """The engine as it is deployed, with the inputs of its products rounded, against PyTorch without that.

    Args:
        deployment: as it is deployed.
        reference: PyTorch with the dequantised weights.
        folders: adapter folder of each task.
        rows: token ids.
        texts: prompts to generate from; ``None`` to leave that out.
        engine: backend and variant.
        steps: greedy steps.
    """
    checks = []
    with reference.rounded_activations():
        for task in (None, *deployment.tasks):
            label = "activations/base" if task is None else f"activations/task/{task}"
            with reference.adapted(None if task is None else folders[task]):
                comparison = compare_outputs(label, deployment, reference, task, Rows(rows))
                checks += comparison.checks
                if texts is None or task is not None:
                    continue
                generator = Generator(deployment, *engine)
                typical = comparison.typical["logits"]
                verdicts = [judge(reference, generator, row, typical) for row in generator.generate(texts, task, steps)]
                checks += check_generation(label, verdicts)
                generator.close()
    return checks


def text_rows(text: str, deployment: Deployment, quick: bool) -> list[list[int]]:
    """Token ids of a text, cut into rows of equal length; what is left over is dropped unless it is all there is.

    Raises:
        DataError: there is nothing to predict in it.
    """
    ids = deployment.tokenizer.encode(text)
    longest = min(ROW_TOKENS, deployment.manifest.base.max_positions or ROW_TOKENS)
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens, expected at least 2 to predict one from another")
    rows = [ids[start : start + longest] for start in range(0, max(1, len(ids) - longest + 1), longest)]
    return rows[: _QUICK_TEXT_ROWS if quick else _TEXT_ROWS]


def measure_cost(deployment: Deployment, reference: Reference, rows: list[list[int]]) -> Cost:
    """Outputs with the checkpoint's weights, with the dequantised ones, and of the engine as it is deployed.

    Args:
        deployment: as it is deployed.
        reference: PyTorch with the dequantised weights.
        rows: token ids; the base model runs on each.

    Returns:
        By figure (``perplexity``, ``top1``, ``kl``, ``max_logit_change``; for an encoder ``cosine``, ``max_change``),
        its value ``float32``, ``weights`` (dequantised, in PyTorch) and ``deployed``. All but perplexity are relative
        to float32; ``cosine`` is of the rows' mean hidden states, the smallest.
    """
    sums: dict[str, list[_Sums]] = {"float32": [], "weights": [], "deployed": []}
    name = "last_hidden_state" if deployment.manifest.base.kind == "encoder" else "logits"
    for index, ids in enumerate(rows):
        decoder = decoder_row(deployment, index)
        with reference.original_weights():
            exact = reference.values(ids, decoder)[name]
        targets = (decoder or ids)[1:] if name == "logits" else None
        sums["float32"].append(_Sums(exact, exact, targets))
        sums["weights"].append(_Sums(reference.values(ids, decoder)[name], exact, targets))
        output = deployment.run(input_ids=[ids], decoder_input_ids=decoder and [decoder])[name][0]
        deployed = as_numbers(output, deployment.manifest.base.embedding_dtype)
        sums["deployed"].append(_Sums(deployed, exact, targets))
    figures = sums["float32"][0].figures
    return {figure: {side: _total(figure, rows_of_side) for side, rows_of_side in sums.items()} for figure in figures}


def check_cost(cost: Cost, most_percent: float) -> Check:
    """The user's limit on the perplexity as deployed; raises ``RequestError`` for an encoder, which has none."""
    if "perplexity" not in cost:
        raise RequestError("an encoder has no perplexity: leave --max-perplexity-increase out; its cosine is reported")
    figures = cost["perplexity"]
    increase = 100 * (figures["deployed"] / figures["float32"] - 1)
    detail = f"percent: {figures['float32']:.3f} in float32, {figures['deployed']:.3f} as deployed"
    return at_most("quantization/perplexity", increase, most_percent, detail)


class _Sums:
    """Figures of one row, and its number of predicted tokens."""

    def __init__(self, values: Array, exact: Array, targets: list[int] | None) -> None:
        self.positions = len(values) if targets is None else len(targets)
        change = float(largest_deviations(values, exact).max())
        if targets is None:
            means = values.mean(axis=0, dtype=np.float64), exact.mean(axis=0, dtype=np.float64)
            cosine = float(means[0] @ means[1] / (np.linalg.norm(means[0]) * np.linalg.norm(means[1])))
            self.figures = {"cosine": cosine, "max_change": change}
            return
        surprises: list[float] = []
        divergences: list[float] = []
        for received, expected in widened(values, exact):
            log_p, log_q = log_softmax(expected), log_softmax(received)
            divergences += (np.exp(log_p) * (log_p - log_q)).sum(axis=1).tolist()
            following = targets[len(surprises) : len(surprises) + len(received)]
            surprises += (-log_q[np.arange(len(following)), following]).tolist()
        self.figures = {
            "perplexity": float(np.mean(surprises)) if targets else 0.0,
            "top1": float((values.argmax(axis=1) == exact.argmax(axis=1)).mean()),
            "kl": float(np.mean(divergences)),
            "max_logit_change": change,
        }


def _total(figure: str, rows: list[_Sums]) -> float:
    values = [row.figures[figure] for row in rows]
    if figure.startswith("max_"):
        return max(values)
    if figure == "cosine":
        return min(values)
    mean = float(np.average(values, weights=[row.positions for row in rows]))
    return float(np.exp(mean)) if figure == "perplexity" else mean
