"""Level 3, generation: every token that the deployment chose greedily must be PyTorch's choice after the same prefix.

PyTorch runs once over the prompt and the chosen tokens. If each token is the likeliest after its prefix, the sequence
is the greedy one. A token counts as wrong only where PyTorch prefers another by more than twice the logit limit: below
that, two correct engines may differ, and the comparison goes on along the deployment's own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from adalink.runtime.deployment import Deployment
from adalink.runtime.engine import open_backend
from adalink.runtime.generation import Generation
from adalink.tools.parity_reference import Reference
from adalink.tools.parity_report import Check, at_most


@dataclass(frozen=True)
class Verdict:
    """What PyTorch says of one generated row.

    Attributes:
        ties: steps where PyTorch prefers another token by no more than rounding may explain.
        detail: the first step whose token PyTorch clearly would not choose; empty if there is none.
    """

    ties: int
    detail: str


def open_endless(deployment: Deployment, backend: str, threads: int | None) -> Deployment:
    """The deployment again, with no token that ends a generation: a short answer still gives many steps to compare."""
    base = msgspec.structs.replace(deployment.manifest.base, eos_token_ids=())
    manifest = msgspec.structs.replace(deployment.manifest, base=base)
    return Deployment(deployment.path, manifest, open_backend(backend, threads))


def judge_rows(
    reference: Reference, endless: Deployment, prompts: list[str], rows: list[Generation], limit: float
) -> list[Verdict]:
    """Judge each generated row; the reference has the adapter of the rows' task attached."""
    return [
        _judge(reference, endless, endless.tokenizer.encode(prompt), list(row.token_ids), limit)
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def check_generation(name: str, verdicts: list[Verdict], steps: int) -> Check:
    """No row may hold a token that PyTorch would clearly not choose."""
    wrong = [f"row {index}, {verdict.detail}" for index, verdict in enumerate(verdicts) if verdict.detail]
    ties = sum(verdict.ties for verdict in verdicts)
    detail = f"rows with a wrong token, of {len(verdicts)} rows of {steps} greedy steps, {ties} ties"
    return at_most(name, len(wrong), 0, "; ".join([detail, *wrong[:3]]))


def _judge(
    reference: Reference, deployment: Deployment, prompt: list[int], generated: list[int], limit: float
) -> Verdict:
    """Compare generated tokens with PyTorch's logits after the same prefixes."""
    base = reference.base
    if base.kind == "encoder-decoder":
        assert base.decoder_start_token_id is not None
        logits = reference.outputs(prompt, [base.decoder_start_token_id, *generated[:-1]]).values["logits"]
    else:
        whole = reference.outputs([*prompt, *generated[:-1]], None, prompt_length=len(prompt)).values["logits"]
        logits = whole[len(prompt) - 1 :]
    chosen = np.array(generated)
    margins = logits.max(axis=1) - logits[np.arange(len(chosen)), chosen]
    ties = int(((margins > 0) & (margins <= 2 * limit)).sum())
    wrong = np.flatnonzero(~(margins <= 2 * limit))
    if not len(wrong):
        return Verdict(ties, "")
    step = int(wrong[0])
    ours, theirs = (deployment.tokenizer.decode([int(token)]) for token in (chosen[step], logits[step].argmax()))
    detail = f"step {step} gave {ours!r}, PyTorch {theirs!r} by {margins[step]:.2e} (ties end at {2 * limit:.2e})"
    return Verdict(ties, detail)
