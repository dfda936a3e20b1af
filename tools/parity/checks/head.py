"""Level 3, heads: scores and labels of tasks with a head against PyTorch, computed here a second time in float64.

The adapter folder gives weights and labels, transformers gives tokens and words, and the reference gives states. The
bound of a score is that of the states, through the pooling and the head: ``|W| (e + u |x|)``, for pooled states ``x``
with the error ``e``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adalink.export.adapter.error_bound import UNIT_ROUNDOFF, Float64, worst_ratio
from adalink.export.adapter.head_graph import check_head_graph
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import AdaLinkError
from adalink.runtime.storage.adapter import Adapter, read_adapter
from adalink.runtime.storage.head_spec import (
    HEAD_BIAS,
    HEAD_WEIGHT,
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    TOKENS,
    Head,
)
from adalink.runtime.storage.integrity import read_graph
from adalink.runtime.storage.manifest import Task
from adalink.runtime.text_classifier import PreparedText
from adalink.tools.parity.checks.outputs import Comparison, decoder_row
from adalink.tools.parity.checks.pooling import pool_with_error
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.reference.position_labels import NO_LABELS, PositionLabels
from adalink.tools.parity.report import Check, at_most

# Scripts in which a tokenizer's word is a whole sentence, by the names of their letters.
_WITHOUT_SPACES = ("THAI", "LAO", "MYANMAR", "KHMER", "HIRAGANA", "KATAKANA", "CJK")
# Roundings of sums in float64, far below those of the states.
_ROUNDING = 1e-9


def check_head(
    task: str | None,
    folders: Mapping[str, Path],
    deployment: Deployment,
    reference: Reference,
    prompts: Sequence[str],
    compared: Comparison,
) -> list[Check]:
    """Compare what a task with a head says with PyTorch; nothing for a task without.

    Args:
        task: the task, whose adapter is attached to the reference; ``None`` for the base.
        folders: adapter folder of each task.
        deployment: the deployment.
        reference: PyTorch.
        prompts: texts.
        compared: the states of the same task, for the typical noise.
    """
    if task is None or deployment.manifest.tasks[task].head is None or not prompts:
        return []
    adapter = read_adapter(folders[task])
    head = adapter.config.head
    if head is None:
        return [at_most(f"task/{task}/head", np.inf, 1.0, f"{folders[task]} has no head, the deployed task has one")]
    ratio, wrong, detail, first = 0.0, 0, "no text could be compared", "none"
    texts = _texts(prompts, head, deployment)
    for index, text in enumerate(texts):
        typical = compared.typical["last_hidden_state"]
        encoded, scores, bounds = _reference_scores(text, adapter, head, deployment, reference, typical)
        try:
            prepared = deployment.text_classifier.prepare([text], task)
            received = deployment.text_classifier.scores(prepared)[0]
            said = deployment.classify([text], task)[0]
        except AdaLinkError as error:
            return [at_most(f"task/{task}/head", np.inf, 1.0, f"text {index}: {error}")]
        if received.shape != scores.shape:
            return [at_most(f"task/{task}/head", np.inf, 1.0, f"text {index}: {received.shape} and {scores.shape}")]
        worst = worst_ratio(received, scores, bounds)
        if not worst <= ratio or index == 0:
            ratio, detail = worst, f"measured / bound of the scores of {len(texts)} texts, nearest at text {index}"
        if fault := fault_in_answer(said, text, head, encoded, scores, bounds):
            first = f"text {index}: {fault}" if not wrong else first
            wrong += 1
    return [
        check_weights(task, adapter, deployment),
        _check_graph(task, adapter, deployment),
        at_most(f"task/{task}/head", ratio, 1.0, detail),
        at_most(f"task/{task}/head-labels", wrong, 0, f"of {len(texts)} texts; first: {first}"),
    ]


def check_weights(task: str, adapter: Adapter, deployment: Deployment) -> Check:
    """Unit vectors through the head as the deployment has loaded it: each weight stands alone.

    A bound that holds for sums of ``d`` states cannot see every small change of one weight.
    """
    (prepared,) = deployment.text_classifier.prepare(["a"], task)
    assert isinstance(prepared, PreparedText)
    loaded = prepared.head
    weight, bias = adapter.weights[HEAD_WEIGHT].astype(np.float64), adapter.weights[HEAD_BIAS].astype(np.float64)
    ratio, detail = 0.0, ""
    for column in range(weight.shape[1]):
        for sign in (1.0, -1.0):
            states = np.zeros((1, weight.shape[1]), np.float32)
            states[0, column] = sign
            received = loaded.scores(states).reshape(-1)
            expected = sign * weight[:, column] + bias
            bound = 2 * UNIT_ROUNDOFF["float32"] * (np.abs(weight[:, column]) + np.abs(bias)) + 1e-30
            if received.shape != expected.shape:
                return at_most(f"adapter/{task}/head-weights", np.inf, 1.0, f"{received.shape}, not {expected.shape}")
            worst = worst_ratio(received, expected, bound)
            if not worst <= ratio:
                ratio, detail = worst, f"; worst: {sign:+g} times unit vector {column}"
    return at_most(f"adapter/{task}/head-weights", ratio, 1.0, f"measured / bound over the unit vectors{detail}")


def _check_graph(task: str, adapter: Adapter, deployment: Deployment) -> Check:
    """The head as other hosts run it: seeded states of several lengths through its own graph."""
    name, path = f"adapter/{task}/head-graph", deployment.manifest.tasks[task].head_graph
    if path is None:
        return at_most(name, np.inf, 1.0, "the task has no graph of its head: export the adapter again")
    try:
        graph = read_graph(deployment.path, deployment.manifest, path)
        ratio = check_head_graph(graph, adapter, deployment.manifest.base.embedding_dtype)
    except AdaLinkError as error:
        return at_most(name, np.inf, 1.0, str(error))
    return at_most(name, ratio, 1.0, "measured / bound of its scores")


def is_head_alone(task: Task) -> bool:
    """Whether a task leaves the base's states as they are, so that its outputs have no negative control."""
    return task.head is not None and not task.rank and not task.soft_tokens


def _texts(prompts: Sequence[str], head: Head, deployment: Deployment) -> list[str | tuple[str, str]]:
    """The prompts, one that is cut, and pairs, one of which is cut, where the base takes them."""
    longest = max(prompts, key=len)
    repeats = 1 + head.max_tokens // max(1, len(longest.split()))
    long = " ".join([longest] * repeats)
    texts: list[str | tuple[str, str]] = [*prompts, long]
    if head.problem_type != TOKENS and deployment.manifest.base.takes_token_types:
        texts += [(prompts[0], prompts[-1]), (prompts[0], long), (long, long)]
    return texts


def _reference_scores(
    text: str | tuple[str, str],
    adapter: Adapter,
    head: Head,
    deployment: Deployment,
    reference: Reference,
    typical: float,
) -> tuple[Any, Float64, Float64]:
    """Tokens of a text by transformers, its scores, and the largest error of each."""
    tokenizer: Any = reference.tokenizer
    tokenizer.truncation_side = "right"
    first, second = (text, None) if isinstance(text, str) else text
    encoded = tokenizer(
        first, second, truncation=True, max_length=_limit(head, adapter, deployment), return_offsets_mapping=True
    )
    types = encoded.get("token_type_ids") if deployment.manifest.base.takes_token_types else None
    labels = NO_LABELS if types is None else PositionLabels(list(types))
    outputs = reference.outputs(list(encoded["input_ids"]), decoder_row(deployment, 0), labels=labels)
    states = outputs.values["last_hidden_state"].astype(np.float64)
    errors = reference.limit(outputs.noise["last_hidden_state"], typical)[:, None] * np.ones_like(states)
    if head.pooling:
        states, errors = pool_with_error(head.pooling, states, errors, 0)
    weight = adapter.weights[HEAD_WEIGHT].astype(np.float64)
    scores = states @ weight.T + adapter.weights[HEAD_BIAS]
    errors = errors + UNIT_ROUNDOFF["float32"] * np.abs(states)
    return encoded, scores, errors @ np.abs(weight).T + _ROUNDING * (1 + np.abs(scores))


def _limit(head: Head, adapter: Adapter, deployment: Deployment) -> int:
    positions = deployment.manifest.base.max_positions
    return head.max_tokens if positions is None else min(head.max_tokens, positions - adapter.config.soft_tokens)


def fault_in_answer(
    said: Any, text: str | tuple[str, str], head: Head, encoded: Any, scores: Float64, bounds: Float64
) -> str:
    """What is wrong with an answer, given the scores of PyTorch; empty if nothing, or where two scores are a tie."""
    slack = 2 * float(bounds.max())
    if head.problem_type == REGRESSION:
        return "" if abs(said.value - scores[0]) <= slack else f"{said.value}, PyTorch {scores[0]}"
    if head.problem_type == TOKENS:
        if (np.diff(np.sort(scores, axis=1)[:, -2:], axis=1) <= slack).any():
            return ""
        ours = [(span.start, span.end, span.label, span.text) for span in said.spans]
        theirs = _spans(str(text), encoded, [head.labels[number] for number in scores.argmax(axis=1)])
        return "" if ours == theirs else f"{ours}, PyTorch {theirs}"
    shares = 1 / (1 + np.exp(-scores))
    if head.problem_type == SINGLE_LABEL:
        shares = np.exp(scores - np.logaddexp.reduce(scores))
        chosen = head.labels.index(said.label) if said.label in head.labels else -1
        if chosen < 0 or scores.max() - scores[chosen] > slack:
            return f"{said.label!r}, PyTorch {head.labels[int(scores.argmax())]!r}"
    wrong = [label for label, share in zip(head.labels, shares, strict=True) if _is_wrong(said, label, share, slack)]
    if wrong or len(said.probabilities) != len(head.labels):
        return f"probabilities of {', '.join(wrong) or 'other labels'}"
    if head.problem_type == MULTI_LABEL:
        positive = {label for label, score in zip(head.labels, scores, strict=True) if score >= 0}
        unsure = {label for label, score in zip(head.labels, scores, strict=True) if abs(score) <= slack}
        return "" if set(said.labels) - unsure == positive - unsure else f"{said.labels}, PyTorch {sorted(positive)}"
    return ""


def _is_wrong(said: Any, label: str, share: float, slack: float) -> bool:
    """Whether a probability is further off than scores that differ by ``slack`` let it be: at most by a quarter."""
    return not abs(said.probabilities.get(label, np.inf) - share) <= slack / 2 + 1e-9


def _spans(text: str, encoded: Any, tags: Sequence[str]) -> list[tuple[int, int, str, str]]:
    """Spans by the tags of first tokens of words, word after word."""
    words: list[tuple[int, list[int]]] = []
    for position, word in enumerate(encoded.word_ids()):
        start, end = encoded["offset_mapping"][position]
        content = text[start:end].strip()
        if word is None or not content:
            continue
        if words and words[-1][0] == word and not unicodedata.name(content[0], "").startswith(_WITHOUT_SPACES):
            words[-1][1].append(position)
        else:
            words.append((word, [position]))
    spans: list[tuple[int, int, str, str]] = []
    before = "O"
    for _, positions in words:
        tag = tags[positions[0]]
        pieces = [encoded["offset_mapping"][position] for position in positions]
        start, end = pieces[0][0], pieces[-1][1]
        start = end - len(text[start:end].lstrip())
        if tag.startswith("I-") and before[2:] == tag[2:]:
            start = spans.pop()[0]
        if tag != "O":
            spans.append((start, end, tag[2:], text[start:end]))
        before = tag
    return spans
