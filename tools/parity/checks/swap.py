"""Level 4: switching tasks leaves no trace, rows of a batch do not affect each other, and nothing is rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from adalink.runtime.deployment import Deployment
from adalink.tools.parity.checks.adapter import as_numbers
from adalink.tools.parity.checks.outputs import Comparison, Rows, decoder_row, worst_of
from adalink.tools.parity.checks.swap_worker import run_fresh
from adalink.tools.parity.reference.noise_floor import largest_deviations
from adalink.tools.parity.report import Check, at_most

_MIXED_ROWS = 8
# Of one batch, 256 MiB in float32.
_MOST_LOGITS = 1 << 26


def check_swaps(
    deployment: Deployment, backend: str, variant: str, threads: int | None, row: list[int]
) -> tuple[list[Check], dict[str, object]]:
    """Switch from the base through every task and back in one process, and compare each with a fresh process.

    Args:
        deployment: the deployment, for its path and tasks; it is not run.
        backend: the engine's backend.
        variant: variant of the base.
        threads: threads of the engine.
        row: token ids.

    Returns:
        The checks, and the receipt.
    """
    there = [None, *deployment.tasks]
    tour = [*there, *there[-2::-1]]
    decoder = decoder_row(deployment, 0)
    request: dict[str, Any] = {
        "path": str(deployment.path),
        "backend": backend,
        "variant": variant,
        "threads": threads,
        "ids": [row],
        "decoder_ids": decoder and [decoder],
    }
    toured = run_fresh({**request, "tasks": tour})
    fresh = {task: run_fresh({**request, "tasks": [task]}) for task in there}
    digests_of: dict[str | None, set[str]] = {task: set() for task in there}
    for task, digest in zip(tour, toured["digests"], strict=True):
        digests_of[task].add(digest)
    names = {task: task or "base" for task in there}
    changed = [names[task] for task, digests in digests_of.items() if len(digests) > 1]
    differing = [names[task] for task in there if fresh[task]["digests"] != [toured["digests"][tour.index(task)]]]
    path = " -> ".join(names[task] for task in tour)
    altered = sum(not answer["unchanged"] for answer in (toured, *fresh.values()))
    switches = f"{len(tour) - 1} task switches"
    checks = [
        at_most("swap/return", len(changed), 0, f"{path}: each bit for bit as before; differing: {changed or 'none'}"),
        at_most("swap/fresh-process", len(differing), 0, f"equal to fresh processes; not: {differing or 'none'}"),
        at_most("receipt/engine-builds", toured["builds"], 0, f"engines opened during {switches}"),
        at_most("receipt/builder-calls", toured["builder_calls"], 0, f"calls of a builder during {switches}"),
        at_most("receipt/base-files", altered, 0, "processes that found a byte of the base changed"),
    ]
    receipt = {
        "tour": [names[task] for task in tour],
        "outputs": {names[task]: f"sha256:{toured['digests'][tour.index(task)]}" for task in there},
        "engine_builds_during_swaps": toured["builds"],
        "builder_calls_during_swaps": toured["builder_calls"],
        "base_files": toured["files"],
        "base_unchanged": altered == 0,
    }
    return checks, receipt


def check_mixed_outputs(
    deployment: Deployment, rows: list[list[int]], compared: Mapping[str | None, Comparison]
) -> list[Check]:
    """Compare one padded batch with another task in each row with each row alone.

    Args:
        deployment: the deployment to verify.
        rows: token ids.
        compared: comparison of each task on the rows alone, for tolerances.
    """
    base = deployment.manifest.base
    tasks = mixed_tasks(deployment)
    fitting = _fitting(rows, len(tasks) * base.vocab_size if "logits" in compared[None].limits else 0)
    chosen = [fitting[index % len(fitting)] for index in range(len(tasks))]
    longest = max(len(rows[index]) for index in chosen)
    ids = np.full((len(tasks), longest), base.pad_token_id, np.int64)
    mask = np.zeros((len(tasks), longest), np.int64)
    places = []
    for place, index in enumerate(chosen):
        start = longest - len(rows[index]) if base.kind == "decoder" else 0
        places.append(slice(start, start + len(rows[index])))
        ids[place, places[-1]] = rows[index]
        mask[place, places[-1]] = 1
    decoder = [row or [] for row in (decoder_row(deployment, index) for index in chosen)]
    is_seq2seq = base.kind == "encoder-decoder"
    mixed = deployment.run(
        input_ids=ids, attention_mask=mask, tasks=tasks, decoder_input_ids=decoder if is_seq2seq else None
    )
    checks = []
    for name in compared[None].limits:
        deviations, limits = [], []
        for place, (index, task) in enumerate(zip(chosen, tasks, strict=True)):
            together = mixed[name][place]
            if not (is_seq2seq and name == "logits"):
                together = together[places[place]]
            alone = Rows(rows).received(deployment, task, index)[name]
            deviations.append(largest_deviations(as_numbers(together, base.embedding_dtype), alone))
            limits.append(compared[task].limits[name][index])
        deviation, limit, place, position = worst_of(deviations, limits)
        detail = (
            f"|Δ| nearest its limit, of {len(tasks)} rows in one padded batch from each alone: row {place} "
            f"({tasks[place] or 'base'}), position {position}"
        )
        checks.append(at_most(f"mixed/{name}", deviation, limit, detail))
    return checks


def _fitting(rows: list[list[int]], position_logits: int) -> list[int]:
    """Numbers of the rows that may be in the batch, so that its logits fit into the memory set aside for them.

    Args:
        rows: token ids.
        position_logits: logits of one position of all rows.
    """
    longest = max(_MOST_LOGITS // max(1, position_logits), min(map(len, rows)))
    return [index for index, row in enumerate(rows) if len(row) <= longest]


def mixed_tasks(deployment: Deployment) -> list[str | None]:
    """A task for each row of a mixed batch: the base and every task in turn."""
    choices = [None, *deployment.tasks]
    return [choices[index % len(choices)] for index in range(max(_MIXED_ROWS, len(choices)))]
