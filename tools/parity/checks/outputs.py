"""Levels 2, 3 and 5: outputs of the deployment against PyTorch, row by row, for the base and for each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adalink.export.adapter.error_bound import Float64
from adalink.runtime.arrays import Array
from adalink.runtime.deployment import Deployment
from adalink.tools.parity.checks.adapter import as_numbers
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.reference.noise_floor import TYPICAL_PERCENTILE, Outputs, largest_deviations, widened
from adalink.tools.parity.reference.position_labels import NO_LABELS, PositionLabels
from adalink.tools.parity.report import Check, at_most, more_than

if TYPE_CHECKING:
    from adalink.tools.parity.checks.vision import ImagePrompts

# Rounding of the float64 sums in the divergence itself.
_KL_ROUNDING = 1e-14
_DECODER_TOKENS = 8


@dataclass(frozen=True)
class Comparison:
    """Outputs of a deployment compared with PyTorch's.

    Attributes:
        checks: the checks.
        limits: tolerance at each position, by output; one array for each row.
        typical: float32's typical noise, by output.
    """

    checks: list[Check]
    limits: dict[str, list[Float64]]
    typical: dict[str, float]


@dataclass(frozen=True)
class Rows:
    """Rows to run, each alone.

    Attributes:
        ids: token ids.
        image_prompts: images of these rows, if any.
        labels: labels of these rows, if any.
    """

    ids: list[list[int]]
    image_prompts: ImagePrompts | None = None
    labels: list[PositionLabels] | None = None

    def labels_of(self, index: int) -> PositionLabels:
        """Labels of a row."""
        return NO_LABELS if self.labels is None else self.labels[index]

    def expected(self, reference: Reference, decoder_ids: list[int] | None, index: int) -> Outputs:
        """PyTorch's outputs for a row."""
        pixels = None if self.image_prompts is None else self.image_prompts.pixels[index]
        return reference.outputs(self.ids[index], decoder_ids, pixels=pixels, labels=self.labels_of(index))

    def received(self, deployment: Deployment, task: str | None, index: int) -> dict[str, Array]:
        """The deployment's outputs for a row under a task."""
        decoder_ids = decoder_row(deployment, index)
        outputs = deployment.run(
            input_ids=[self.ids[index]],
            images=None if self.image_prompts is None else [self.image_prompts.images[index]],
            tasks=task,
            decoder_input_ids=decoder_ids and [decoder_ids],
            **self.labels_of(index).arguments(),
        )
        dtype = deployment.manifest.base.embedding_dtype
        return {name: as_numbers(value[0], dtype) for name, value in outputs.items()}


def compare_outputs(
    prefix: str, deployment: Deployment, reference: Reference, task: str | None, rows: Rows
) -> Comparison:
    """Run every row in the deployment and in PyTorch, with the task's adapter attached.

    Outputs of a row may be hundreds of megabytes, so figures of each position are all that is kept of them.

    Args:
        prefix: prefix of the checks' names, such as ``base`` or ``task/topics``.
        deployment: the deployment to verify.
        reference: PyTorch, with the task's adapter attached.
        task: the deployment's task; ``None`` for the base model.
        rows: the rows.
    """
    figures: dict[str, list[_RowFigures]] = {}
    for index in range(len(rows.ids)):
        expected = rows.expected(reference, decoder_row(deployment, index), index)
        received = rows.received(deployment, task, index)
        for name, values in expected.values.items():
            row = _figures(received[name], values, expected.noise[name], is_logits=name == "logits")
            figures.setdefault(name, []).append(row)
    checks: list[Check] = []
    limits: dict[str, list[Float64]] = {}
    typical: dict[str, float] = {}
    for name, of_rows in figures.items():
        noise = [row.noise for row in of_rows]
        typical[name] = float(np.percentile(np.concatenate(noise), TYPICAL_PERCENTILE))
        limits[name] = [reference.limit(row, typical[name]) for row in noise]
        source = f"{reference.noise_source} is itself typically {typical[name]:.1e} away"
        checks.append(_check_deviation(f"{prefix}/{name}", of_rows, limits[name], source))
        if name == "logits":
            checks += _check_predictions(prefix, of_rows, limits[name])
    return Comparison(checks, limits, typical)


def check_control(
    name: str, deployment: Deployment, task: str, rows: Rows, limits_of: dict[str, list[Float64]]
) -> list[Check]:
    """The negative control: a task must change the base's output by more than any rounding could.

    Args:
        name: of the checks, behind ``control/``: the task's, and ``images`` where it is measured on them.
        deployment: the deployment.
        task: the task.
        rows: the rows.
        limits_of: tolerances of the task's outputs on these rows, by output.
    """
    changes: dict[str, list[float]] = {output: [] for output in limits_of}
    for index in range(len(rows.ids)):
        with_task, without = (rows.received(deployment, one, index) for one in (task, None))
        for output, values in with_task.items():
            changes[output].append(float(largest_deviations(values, without[output]).max()))
    return [check_change(f"control/{name}/{output}", changes[output], limits) for output, limits in limits_of.items()]


def check_change(name: str, changes: list[float], limits: list[Float64]) -> Check:
    """The largest change of a row must exceed the largest limit of its positions."""
    row = int(np.argmax(changes))
    detail = f"the task must change the base's output by more than this; largest at prompt {row}"
    return more_than(name, changes[row], float(limits[row].max()), detail)


def worst_of(deviations: list[Float64], limits: list[Float64]) -> tuple[float, float, int, int]:
    """The deviation nearest its limit, or furthest beyond.

    Args:
        deviations: one array of shape ``(positions,)`` for each row.
        limits: likewise.

    Returns:
        Deviation, limit, row and position; a deviation that is NaN comes first.
    """
    ratios = [np.nan_to_num(deviation / limit, nan=np.inf) for deviation, limit in zip(deviations, limits, strict=True)]
    row = int(np.argmax([ratio.max() for ratio in ratios]))
    position = int(ratios[row].argmax())
    return float(deviations[row][position]), float(limits[row][position]), row, position


def decoder_row(deployment: Deployment, row: int) -> list[int] | None:
    """Decoder tokens of a row for an encoder-decoder; ``None`` for every other kind."""
    base = deployment.manifest.base
    if base.kind != "encoder-decoder":
        return None
    assert base.decoder_start_token_id is not None
    rng = np.random.default_rng([7, row])
    return [base.decoder_start_token_id, *rng.integers(0, base.vocab_size, _DECODER_TOKENS - 1).tolist()]


@dataclass(frozen=True)
class _RowFigures:
    """One output of one row; arrays of shape ``(positions,)``, the last three of logits alone.

    Attributes:
        noise: float32's noise.
        deviation: the largest deviation.
        divergence: of the distribution of the next token, ``KL(PyTorch || deployment)`` in nats.
        margin: how much PyTorch prefers another token than the deployment's likeliest.
        agrees: whether both have the same likeliest token.
    """

    noise: Float64
    deviation: Float64
    divergence: Float64
    margin: Float64
    agrees: npt.NDArray[np.bool_]


def _figures(ours: Array, theirs: Array, noise: Float64, *, is_logits: bool) -> _RowFigures:
    """Figures of each position; NaN for outputs too many."""
    if ours.shape != theirs.shape:
        ours = np.full_like(theirs, np.nan)
    deviations, divergences, margins, agrees = [], [], [], []
    for mine, other in widened(ours, theirs):
        deviations.append(np.abs(mine - other).max(axis=1))
        if is_logits:
            log_p, log_q = log_softmax(other), log_softmax(mine)
            divergences.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
            chosen = mine.argmax(axis=1)
            margins.append(other.max(axis=1) - np.take_along_axis(other, chosen[:, None], axis=1)[:, 0])
            agrees.append(chosen == other.argmax(axis=1))
    return _RowFigures(
        noise,
        np.concatenate(deviations),
        np.concatenate(divergences or [np.zeros(0)]),
        np.concatenate(margins or [np.zeros(0)]),
        np.concatenate(agrees or [np.zeros(0, np.bool_)]),
    )


def _check_deviation(name: str, rows: list[_RowFigures], limits: list[Float64], noise: str) -> Check:
    deviation, limit, row, position = worst_of([row.deviation for row in rows], limits)
    detail = (
        f"|Δ| nearest its limit, of {sum(len(row.deviation) for row in rows)} positions of {len(rows)} prompts: "
        f"prompt {row}, position {position}; {noise}"
    )
    return at_most(name, deviation, limit, detail)


def _check_predictions(prefix: str, rows: list[_RowFigures], limits: list[Float64]) -> list[Check]:
    """KL divergence of the next-token distributions, and the likeliest token."""
    total, agreeing, decisive, first = 0, 0, 0, ""
    for index, (row, limit) in enumerate(zip(rows, limits, strict=True)):
        total += len(row.agrees)
        agreeing += int(row.agrees.sum())
        bad = np.flatnonzero(~(row.margin <= 2 * limit))
        decisive += len(bad)
        if len(bad) and not first:
            first = f"; first at prompt {index}, position {bad[0]}"
    allowed = [limit**2 / 2 + _KL_ROUNDING for limit in limits]
    divergence, most, worst, position = worst_of([row.divergence for row in rows], allowed)
    where = f"KL(PyTorch || deployment) in nats nearest its limit: prompt {worst}, position {position}"
    agreement = (
        f"{agreeing} of {total} top-1 tokens agree, {total - agreeing - decisive} are ties, {decisive} differ{first}"
    )
    return [
        at_most(f"{prefix}/kl", divergence, most, where),
        at_most(f"{prefix}/top1", decisive, 0, agreement),
    ]


def log_softmax(logits: Float64) -> Float64:
    """Log-probabilities along the last axis of ``(positions, vocab)``."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
