"""Level 3, labels of decoders: how likely each label is behind a prompt, against PyTorch.

PyTorch runs prompt and label as one sequence, without a KV cache. A score sums the log-likelihoods of the label's
tokens and of an end token. Where logits are at most ``e`` off, a log-likelihood is at most ``2 e`` off: its own logit
by ``e``, and the logarithm of the sum over the vocabulary by as much. So the bound of a score is ``sum(2 e)`` over its
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adalink.export.adapter.error_bound import Float64, worst_ratio
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import AdaLinkError
from adalink.runtime.storage.head_spec import SINGLE_LABEL, Head
from adalink.runtime.storage.label_spec import LabelSet
from adalink.tools.parity.checks.head import fault_in_answer
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.report import Check, at_most

# Sequences that PyTorch runs: each is one text and one label. Two texts at least, since one calibrates the other.
_SEQUENCES, _FEWEST_TEXTS = 48, 2
# Roundings of sums in float64, far below those of the logits.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class _Expected:
    """Scores of a text's labels by PyTorch, and the largest error of each, both with shape ``(labels,)``."""

    scores: Float64
    bounds: Float64

    def calibrated(self, neutral: _Expected) -> _Expected:
        """The same less the scores of a prompt without content."""
        return _Expected(self.scores - neutral.scores, self.bounds + neutral.bounds)


def check_labels(
    task: str | None, deployment: Deployment, reference: Reference, texts: Sequence[str] | None, typical: float
) -> list[Check]:
    """Scores of every label, with and without calibration, and what the deployment says.

    Args:
        task: the task; there is nothing to check where it has no labels.
        deployment: the deployment.
        reference: PyTorch, with the task's adapter attached.
        texts: prompts; ``None`` without a tokenizer.
        typical: float32's typical noise in the logits of the same task.
    """
    labels = None if task is None else deployment.manifest.tasks[task].labels
    if task is None or labels is None or not texts:
        return []
    texts = texts[: max(_FEWEST_TEXTS, _SEQUENCES // len(labels.completions))]
    expected = [_expected(reference, text, labels, typical) for text in texts]
    ratio, wrong, detail, first = 0.0, 0, "", "none"
    for index, text in enumerate(texts):
        for neutral in (None, index - 1):
            right = expected[index] if neutral is None else expected[index].calibrated(expected[neutral])
            calibration = None if neutral is None else texts[neutral]
            try:
                worst, fault = _compare(deployment, task, text, labels, calibration, right)
            except AdaLinkError as error:
                return [at_most(f"task/{task}/labels", np.inf, 1.0, f"text {index}: {error}")]
            if not worst <= ratio or not detail:
                ratio, detail = worst, f"nearest at text {index}{'' if neutral is None else ', calibrated'}"
            if fault:
                first = f"text {index}: {fault}" if not wrong else first
                wrong += 1
    of = f"{len(labels.completions)} labels behind {len(texts)} texts"
    return [
        at_most(f"task/{task}/labels", ratio, 1.0, f"measured / bound of the scores of {of}, {detail}"),
        at_most(f"task/{task}/label-answers", wrong, 0, f"answers of {2 * len(texts)} that are wrong; first: {first}"),
    ]


def _compare(
    deployment: Deployment, task: str, text: str, labels: LabelSet, calibration: str | None, right: _Expected
) -> tuple[float, str]:
    """The largest deviation of a score, over its bound, and what is wrong with the answer, if something is."""
    classifier = deployment.text_classifier
    (received,) = classifier.scores(classifier.prepare([text], task, calibration=calibration))
    if received.shape != right.scores.shape:
        return np.inf, f"{len(received)} scores, expected {len(right.scores)}"
    worst = worst_ratio(received, right.scores, right.bounds)
    (said,) = deployment.classify([text], task, calibration=calibration)
    one_label = Head(problem_type=SINGLE_LABEL, labels=labels.names, pooling="mean", max_tokens=1)
    return worst, fault_in_answer(said, text, one_label, None, right.scores, right.bounds)


def _expected(reference: Reference, text: str, labels: LabelSet, typical: float) -> _Expected:
    prompt = reference.prompt_ids(reference.tokenizer, text)
    scored = [_score(reference, prompt, label, typical) for label in labels.completions]
    return _Expected(np.array([score for score, _ in scored]), np.array([bound for _, bound in scored]))


def _score(reference: Reference, prompt: list[int], label: str, typical: float) -> tuple[float, float]:
    """Log-likelihood of one label and an end token behind it, and its largest error."""
    base = reference.base
    tokens = list(reference.tokenizer(label, add_special_tokens=False)["input_ids"])
    targets = [[token] for token in tokens] + ([list(base.eos_token_ids)] if base.eos_token_ids else [])
    if base.kind == "encoder-decoder":
        assert base.decoder_start_token_id is not None
        outputs = reference.outputs(prompt, [base.decoder_start_token_id, *tokens])
    else:
        outputs = reference.outputs([*prompt, *tokens], None, prompt_length=len(prompt))
    logits = outputs.values["logits"][: len(targets)].astype(np.float64)
    limits = reference.limit(outputs.noise["logits"][: len(targets)], typical)
    totals = np.logaddexp.reduce(logits, axis=1)
    chosen = [np.logaddexp.reduce(row[ids]) for row, ids in zip(logits, targets, strict=True)]
    score = float(np.sum(chosen - totals))
    return score, float(2 * limits.sum()) + _ROUNDING * (1 + abs(score))
