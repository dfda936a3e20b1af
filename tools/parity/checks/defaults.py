"""Level 2, generation defaults: a plain greedy request against the model's own ``generate`` with its generation config.

The manifest's defaults come from the checkpoint when the base is exported. Transformers reads the checkpoint here anew
and applies its own processors, so a setting that was dropped, changed or applied wrongly gives other tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from adalink.runtime.deployment import Deployment
from adalink.runtime.sampling.sampler import SamplingParams
from adalink.runtime.storage.generation_schema import GenerationDefaults
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.report import Report, at_most

_STEPS = 16
_PROMPTS = 4
# Share of the largest score within which two float32 engines may prefer different tokens.
_TIE = 1e-3


def check_defaults(report: Report, deployment: Deployment, reference: Reference, rows: Sequence[list[int]]) -> None:
    """Add the check to ``report``, unless neither manifest nor checkpoint asks for anything.

    Only for a float32 base that is not quantised: with other weights a penalty may choose another token rightly.

    Args:
        report: the report.
        deployment: the deployment.
        reference: PyTorch without an adapter.
        rows: token ids of prompts.
    """
    from adalink.export.base.generation import describe_generation

    base = deployment.manifest.base
    is_exact = base.embedding_dtype == "float32" and deployment.variant.quantization is None
    asked = describe_generation(reference.model, base.kind, base.vocab_size)
    if not is_exact or base.bidirectional_prompt or asked is None:
        return
    if base.generation is None:
        report.skipped.append("generation defaults: the base was exported by an older kit, which recorded none")
        return
    if asked == base.generation == GenerationDefaults():
        return
    wrong = []
    limit = base.max_positions or 1 << 20
    for ids in [row for row in rows if len(row) + _STEPS <= limit][:_PROMPTS]:
        sampling = SamplingParams(temperature=0)
        (row,) = deployment.generate([ids], sampling=sampling, max_new_tokens=_STEPS, draft_tokens=0)
        if fault := _first_difference(list(row.token_ids), *_generated(reference, ids, asked), base.eos_token_ids):
            wrong.append(fault)
    detail = f"prompts continued otherwise than by the model's own generate: {wrong[0] if wrong else 'none'}"
    report.checks.append(at_most("base/generation-defaults", len(wrong), 0, detail))


def _generated(reference: Reference, ids: list[int], asked: GenerationDefaults) -> tuple[list[int], np.ndarray]:
    """Tokens of transformers' greedy search, and the scores of each step after its processors."""
    import torch

    model = reference.model
    original = model.generation_config
    config = copy.deepcopy(original)
    for setting in asked.not_applied:
        setattr(config, setting.partition("=")[0], None)
    config.do_sample, config.num_beams, config.max_new_tokens = False, 1, _STEPS
    model.generation_config = config  # not an argument: generate would fill in what it lacks from the model's own
    try:
        prompt = torch.tensor([ids])
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            return_dict_in_generate=True,
            output_scores=True,
            **({"tokenizer": reference.tokenizer} if asked.stop_strings else {}),
        )
    finally:
        model.generation_config = original
    scores = torch.cat(output.scores).double().numpy()
    return output.sequences[0].tolist()[-len(scores) :], scores


def _first_difference(ours: list[int], theirs: list[int], scores: np.ndarray, ends: tuple[int, ...]) -> str:
    """The first step that is no tie, in words; empty if there is none."""
    for step, (token, row) in enumerate(zip(theirs, scores, strict=True)):
        mine = ours[step] if step < len(ours) else None
        if mine == token or (mine is None and token in ends):
            if token in ends:
                return ""
            continue
        chosen = max((row[end] for end in ends), default=-np.inf) if mine is None else row[mine]
        finite = np.abs(row[np.isfinite(row)]).max(initial=1.0)
        if row[token] - chosen <= _TIE * finite:
            return ""  # a tie: what follows differs rightly
        return f"step {step}: token {'end' if mine is None else mine}, transformers {token}"
    return "" if len(ours) <= len(theirs) else f"{len(ours)} tokens, transformers {len(theirs)}"
