"""Level 2, pooling: embeddings of texts against the states of PyTorch, pooled in float64 as the checkpoint says.

The checkpoint's sentence-transformers files are read anew, transformers cuts the texts, and the poolings are written
out here a second time, as products with a matrix of weights. The bound follows from that of the states: a pooling is a
sum of states with weights, or a maximum of them, and dividing by the length changes a vector of length ``s`` by at most
``(e + |u| |e|) / (s - |e|)``, ``u`` being the unit vector and ``e`` the bound of the vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from adalink.export.adapter.error_bound import Float64, worst_ratio
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import AdaLinkError
from adalink.runtime.storage.pooling_schema import Pooling
from adalink.tools.parity.checks.outputs import Comparison, decoder_row
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.report import Check, Report, at_most

# Roundings to float32 of the vector, and of the states where the engine stores less.
_ROUNDING = 4 * 2.0**-24


def check_pooling_settings(report: Report, deployment: Deployment, reference: Reference) -> None:
    """Add the check that the manifest has the checkpoint's settings; nothing where neither says anything."""
    base = deployment.manifest.base
    asked = reference.pooling
    if base.kind == "decoder" or (asked is None and base.pooling is None):
        return
    if base.pooling is None:
        report.skipped.append("pooling: the base was exported without the checkpoint's sentence-transformers files")
        return
    theirs, ours = (msgspec.structs.asdict(one) for one in (asked or Pooling(), base.pooling))
    differing = sorted(name for name in ours if asked is None or theirs[name] != ours[name])
    detail = f"settings that are not those of the checkpoint's files: {', '.join(differing) or 'none'}"
    report.checks.append(at_most("base/pooling-settings", len(differing), 0, detail))
    if base.pooling.unsupported:
        report.skipped.append(f"pooling: {base.pooling.unsupported}, which is not supported")


def pooled_texts(prompts: Sequence[str], pooling: Pooling) -> list[str]:
    """Texts to embed: the prompts, one that is longer than the limit, and one with capital letters."""
    longest = max(prompts, key=len)
    repeats = 1 + 2 * (pooling.max_tokens or 0) // max(1, len(longest.split()))
    return [*prompts, *([" ".join([longest] * repeats)] if pooling.max_tokens is not None else []), "Two CAPITAL Words"]


def check_pooling(
    label: str,
    task: str | None,
    deployment: Deployment,
    reference: Reference,
    prompts: Sequence[str],
    compared: Comparison,
) -> list[Check]:
    """Compare ``Deployment.encode`` with PyTorch; nothing for a base that says no pooling.

    Args:
        label: prefix of the check's name.
        task: the deployment's task; its adapter is attached to the reference.
        deployment: the deployment.
        reference: PyTorch.
        prompts: texts.
        compared: the states of the same task, for the typical noise.
    """
    pooling = reference.pooling if prompts else None
    if pooling is None or not pooling.modes or deployment.manifest.base.pooling is None:
        return []
    worst, detail = 0.0, "no text could be compared"
    texts = pooled_texts(prompts, pooling)
    for index, text in enumerate(texts):
        expected, bound = _reference_vector(text, deployment, reference, pooling, compared.typical["last_hidden_state"])
        try:
            received = np.asarray(deployment.encode([text], task)[0], np.float64)
        except AdaLinkError as error:
            return [at_most(f"{label}/pooling", np.inf, 1.0, f"text {index}: {error}")]
        if received.shape != expected.shape:
            return [at_most(f"{label}/pooling", np.inf, 1.0, f"text {index}: {received.shape} and {expected.shape}")]
        ratio = worst_ratio(received, expected, bound)
        if not ratio <= worst or index == 0:
            worst, detail = ratio, f"measured / bound of {len(texts)} texts, nearest at text {index}"
    return [at_most(f"{label}/pooling", worst, 1.0, detail)]


def _reference_vector(
    text: str, deployment: Deployment, reference: Reference, pooling: Pooling, typical: float
) -> tuple[Float64, Float64]:
    """The vector of a text by PyTorch, and the largest error of each of its numbers."""
    tokenizer: Any = reference.tokenizer
    prompt = pooling.prompts[pooling.default_prompt] if pooling.default_prompt is not None else ""
    limit = {"truncation": True, "max_length": pooling.max_tokens} if pooling.max_tokens is not None else {}

    def encode(content: str) -> list[int]:
        return list(tokenizer(content.lower() if pooling.lower_case else content, **limit)["input_ids"])

    ids = encode(prompt + text)
    first = 0
    if prompt and not pooling.include_prompt:
        prompt_ids = encode(prompt)
        first = len(prompt_ids) - (prompt_ids[-1] in tokenizer.all_special_ids)
    outputs = reference.outputs(ids, decoder_row(deployment, 0))
    states = outputs.values["last_hidden_state"].astype(np.float64)
    errors = reference.limit(outputs.noise["last_hidden_state"], typical)[:, None] * np.ones_like(states)
    vectors, bounds = zip(*(pool_with_error(mode, states, errors, first) for mode in pooling.modes), strict=True)
    vector, bound = np.concatenate(vectors), np.concatenate(bounds)
    if pooling.normalize:
        length, error = float(np.linalg.norm(vector)), float(np.linalg.norm(bound))
        if error >= length:
            return vector / length, np.full_like(vector, np.inf)
        vector, bound = vector / length, (bound + np.abs(vector / length) * error) / (length - error)
    return vector, bound + _ROUNDING * np.maximum(np.abs(vector), bound) + 1e-30


def pool_with_error(mode: str, states: Float64, errors: Float64, first: int) -> tuple[Float64, Float64]:
    """One pooling and its bound.

    Args:
        mode: one of ``adalink.runtime.storage.pooling_schema.POOLING_MODES``.
        states: shape ``(tokens, d)``.
        errors: the largest error of each of them, likewise.
        first: the first token that is pooled.
    """
    count = len(states)
    kept = (np.arange(count) >= first).astype(np.float64)
    if mode == "max":
        return states[first:].max(axis=0), errors[first:].max(axis=0)
    weights = {
        "cls": np.eye(count)[first],
        "lasttoken": np.eye(count)[count - 1],
        "mean": kept / kept.sum(),
        "mean_sqrt_len_tokens": kept / kept.sum() ** 0.5,
        "weightedmean": kept * np.arange(1, count + 1) / (kept * np.arange(1, count + 1)).sum(),
    }[mode]
    return weights @ states, weights @ errors
