"""Levels 2, 3 and 5: outputs of the deployment against PyTorch, row by row, for the base and for each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adalink.export.adapter.error_bound import Float64
from adalink.runtime.deployment import Deployment
from adalink.tools.parity.check_adapter import to_float64
from adalink.tools.parity.noise_floor import TYPICAL_PERCENTILE, Outputs
from adalink.tools.parity.position_labels import NO_LABELS, PositionLabels
from adalink.tools.parity.reference import Reference
from adalink.tools.parity.report import Check, at_most, more_than

if TYPE_CHECKING:
    from adalink.tools.parity.check_vision import ImagePrompts

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
        received: the deployment's outputs, one dictionary for each row.
    """

    checks: list[Check]
    limits: dict[str, list[Float64]]
    typical: dict[str, float]
    received: list[dict[str, Float64]]


def compare_outputs(
    prefix: str,
    deployment: Deployment,
    reference: Reference,
    task: str | None,
    rows: list[list[int]],
    image_prompts: ImagePrompts | None = None,
    labels: list[PositionLabels] | None = None,
) -> Comparison:
    """Run every row alone in the deployment and in PyTorch, with the task's adapter attached.

    Args:
        prefix: prefix of the checks' names, such as ``base`` or ``task/topics``.
        deployment: the deployment to verify.
        reference: PyTorch, with the task's adapter attached.
        task: the deployment's task; ``None`` for the base model.
        rows: token ids.
        image_prompts: images of these rows, if any.
        labels: labels of these rows, if any.
    """
    base = deployment.manifest.base
    expected: list[Outputs] = []
    received: list[dict[str, Float64]] = []
    for index, ids in enumerate(rows):
        decoder_ids = decoder_row(deployment, index)
        pixels, images = (
            (None, None) if image_prompts is None else (image_prompts.pixels[index], [image_prompts.images[index]])
        )
        row_labels = NO_LABELS if labels is None else labels[index]
        expected.append(reference.outputs(ids, decoder_ids, pixels=pixels, labels=row_labels))
        outputs = deployment.run(
            input_ids=[ids],
            images=images,
            tasks=task,
            decoder_input_ids=decoder_ids and [decoder_ids],
            **row_labels.arguments(),
        )
        received.append({name: to_float64(value[0], base.embedding_dtype) for name, value in outputs.items()})
    checks: list[Check] = []
    limits: dict[str, list[Float64]] = {}
    typical: dict[str, float] = {}
    for name in expected[0].values:
        noise = [row.noise[name] for row in expected]
        typical[name] = float(np.percentile(np.concatenate(noise), TYPICAL_PERCENTILE))
        limits[name] = [reference.limit(row, typical[name]) for row in noise]
        pairs = [(ours[name], theirs.values[name]) for ours, theirs in zip(received, expected, strict=True)]
        checks.append(
            _check_deviation(
                f"{prefix}/{name}",
                pairs,
                limits[name],
                f"{reference.noise_source} is itself typically {typical[name]:.1e} away",
            )
        )
        if name == "logits":
            checks += _check_predictions(prefix, pairs, limits[name])
    return Comparison(checks, limits, typical, received)


def check_control(name: str, base: Comparison, adapted: Comparison) -> list[Check]:
    """The negative control: a task must change the base's output by more than any rounding could.

    Args:
        name: of the checks, behind ``control/``: the task's, and ``images`` where it is measured on them.
        base: outputs of the base model.
        adapted: the task's on the same rows.
    """
    checks = []
    for output, limits in adapted.limits.items():
        changes = [
            float(np.abs(with_task[output] - without[output]).max())
            for with_task, without in zip(adapted.received, base.received, strict=True)
        ]
        row = int(np.argmax(changes))
        detail = f"the task must change the base's output by more than this; largest at prompt {row}"
        checks.append(more_than(f"control/{name}/{output}", changes[row], float(limits[row].max()), detail))
    return checks


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


def _check_deviation(name: str, pairs: list[tuple[Float64, Float64]], limits: list[Float64], noise: str) -> Check:
    deviations = [np.abs(ours - theirs).max(axis=1) for ours, theirs in pairs]
    deviation, limit, row, position = worst_of(deviations, limits)
    detail = (
        f"|Δ| nearest its limit, of {sum(map(len, deviations))} positions of {len(pairs)} prompts: prompt {row}, "
        f"position {position}; {noise}"
    )
    return at_most(name, deviation, limit, detail)


def _check_predictions(prefix: str, pairs: list[tuple[Float64, Float64]], limits: list[Float64]) -> list[Check]:
    """KL divergence of the next-token distributions, and the likeliest token."""
    divergences, total, agreeing, decisive, first = [], 0, 0, 0, ""
    for row, ((ours, theirs), limit) in enumerate(zip(pairs, limits, strict=True)):
        log_p, log_q = log_softmax(theirs), log_softmax(ours)
        divergences.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
        chosen = ours.argmax(axis=1)
        margins = theirs.max(axis=1) - np.take_along_axis(theirs, chosen[:, None], axis=1)[:, 0]
        total += len(chosen)
        agreeing += int((chosen == theirs.argmax(axis=1)).sum())
        bad = np.flatnonzero(~(margins <= 2 * limit))
        decisive += len(bad)
        if len(bad) and not first:
            first = f"; first at prompt {row}, position {bad[0]}"
    divergence, allowed, row, position = worst_of(divergences, [limit**2 / 2 + _KL_ROUNDING for limit in limits])
    where = f"KL(PyTorch || deployment) in nats nearest its limit: prompt {row}, position {position}"
    agreement = (
        f"{agreeing} of {total} top-1 tokens agree, {total - agreeing - decisive} are ties, {decisive} differ{first}"
    )
    return [
        at_most(f"{prefix}/kl", divergence, allowed, where),
        at_most(f"{prefix}/top1", decisive, 0, agreement),
    ]


def log_softmax(logits: Float64) -> Float64:
    """Log-probabilities along the last axis of ``(positions, vocab)``."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
