"""Level 6: every task at the profile limits of a compiled engine.

Batches and prompts have the smallest and the largest sizes; decode steps reach from the first to the last position of
the cache. A tactic that is wrong for one shape, or a cache read at a wrong length, shows at these limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np

from adalink.export.adapter.error_bound import Float64
from adalink.runtime.deployment import Deployment
from adalink.runtime.profile import Profile
from adalink.tools.parity.checks.adapter import as_numbers
from adalink.tools.parity.checks.generation import Generator, Verdict, check_generation, expected_outputs, judge
from adalink.tools.parity.checks.outputs import Comparison, worst_of
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.reference.noise_floor import Outputs, largest_deviations
from adalink.tools.parity.report import Check, at_most

STEPS = 4


def check_decoder_profile_limits(
    deployment: Deployment,
    generator: Generator,
    reference: Reference,
    folders: Mapping[str, Path],
    compared: Mapping[str | None, Comparison],
    profile: Profile,
) -> list[Check]:
    """Greedy steps of every task at each limit of a decoder's profile, against PyTorch.

    Args:
        deployment: the deployment to verify.
        generator: the same, with its steps recorded.
        reference: PyTorch.
        folders: adapter folder of each task.
        compared: comparison of each task, for its typical noise.
        profile: shapes of the engine.
    """
    base = deployment.manifest.base
    longest = min(profile.capacity, base.max_positions or profile.capacity) - STEPS
    profile_limits = []
    for batch in sorted({profile.batch.min, profile.batch.max}):
        lengths = {1, min(profile.seq.max, longest), longest}
        if base.bidirectional_prompt:  # goes in at once, which an engine that gives all logits has less room for
            lengths = {1, min(profile.seq.max, profile.logits_capacity // batch, longest)}
        profile_limits += [(batch, length) for length in sorted(lengths)]
    verdicts: dict[tuple[int, int], list[Verdict]] = {limit: [] for limit in profile_limits}
    for task in (None, *deployment.tasks):
        expected_of: dict[tuple[int, ...], Outputs] = {}
        with reference.adapted(None if task is None else folders[task]):
            for batch, length in profile_limits:
                rows = _rows(deployment, batch, length, task)
                for row in generator.generate(rows, task, STEPS):
                    sequence = (*row.prompt, *row.tokens)
                    if sequence not in expected_of:
                        expected_of[sequence] = expected_outputs(reference, row)
                    typical = compared[task].typical["logits"]
                    verdicts[batch, length].append(judge(reference, generator, row, typical, expected_of[sequence]))
    return [
        check
        for (batch, length), row_verdicts in verdicts.items()
        for check in check_generation(f"profile/batch={batch},prompt={length}", row_verdicts)
    ]


def check_encoder_profile_limits(
    deployment: Deployment,
    reference: Reference,
    folders: Mapping[str, Path],
    compared: Mapping[str | None, Comparison],
    profile: Profile,
) -> list[Check]:
    """Hidden states under every task at each limit of an encoder's profile, against PyTorch; as for decoders."""
    base = deployment.manifest.base
    name = "last_hidden_state"
    longest = min(profile.seq.max, base.max_positions or profile.seq.max)
    batches = sorted({profile.batch.min, profile.batch.max})
    profile_limits = list(product(batches, sorted({profile.seq.min, longest})))
    compared_rows: dict[tuple[int, int], tuple[list[Float64], list[Float64]]] = {
        limit: ([], []) for limit in profile_limits
    }
    for task in (None, *deployment.tasks):
        expected_of: dict[tuple[int, ...], Outputs] = {}
        with reference.adapted(None if task is None else folders[task]):
            for batch, length in profile_limits:
                rows = _rows(deployment, batch, length, task)
                states = as_numbers(deployment.run(input_ids=rows, tasks=task)[name], base.embedding_dtype)
                for row, ids in enumerate(rows):
                    if tuple(ids) not in expected_of:
                        expected_of[tuple(ids)] = reference.outputs(ids, None)
                    expected = expected_of[tuple(ids)]
                    deviations, limits = compared_rows[batch, length]
                    deviations.append(largest_deviations(states[row], expected.values[name]))
                    limits.append(reference.limit(expected.noise[name], compared[task].typical[name]))
    checks = []
    for (batch, length), (deviations, limits) in compared_rows.items():
        deviation, limit, row, position = worst_of(deviations, limits)
        detail = f"|Δ| nearest its limit, of {len(deviations)} rows: row {row}, position {position}"
        checks.append(at_most(f"profile/batch={batch},seq={length}/{name}", deviation, limit, detail))
    return checks


def _rows(deployment: Deployment, batch: int, length: int, task: str | None) -> list[list[int]]:
    """Seeded prompts of one length with the task's soft prompt: two in turn, so that PyTorch runs only two."""
    base = deployment.manifest.base
    if task is not None:
        length = max(1, length - deployment.manifest.tasks[task].prepended_positions)
    placeholders = () if base.vision is None else (base.vision.image_token_id,)
    usable = np.setdiff1d(np.arange(base.vocab_size), (*base.eos_token_ids, base.pad_token_id, *placeholders))
    rng = np.random.default_rng([20231012, length])
    pair = rng.choice(usable, size=(2, length)).tolist()
    return [pair[row % 2] for row in range(batch)]
