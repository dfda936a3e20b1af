"""What a task is compared with on the same rows: the base model, or the best answer that needs no text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from adalink.tools.evaluation.answers import Answers
from adalink.tools.evaluation.metrics import Flags, gain, majority, mcnemar
from adalink.tools.evaluation.number_metrics import error_gain, sign_flip
from adalink.tools.evaluation.report import Reference
from adalink.tools.evaluation.rows import EvalRow

# A difference with a larger p-value is not called one.
_SIGNIFICANT = 0.05


def against_base(answers: Answers, base: Answers) -> Reference:
    """The base model, which answered the same rows."""
    return _by_accuracy("the base model", answers.right, base.right)


def against_constant(kind: str, rows: Sequence[EvalRow], answers: Answers) -> Reference | None:
    """Always the commonest label, or set of labels; of numbers always their median, which has the smallest error."""
    if kind == SINGLE_LABEL:
        commonest = majority([row.expected.text for row in rows])
        return _by_accuracy(f"always {commonest!r}", answers.right, _flags(rows, [commonest]))
    if kind == MULTI_LABEL:
        sets = [" + ".join(sorted(map(str, row.expected.items))) for row in rows]
        commonest = majority(sets)
        theirs = np.array([one == commonest for one in sets])
        return _by_accuracy(f"always {commonest!r}" if commonest else "always no label", answers.right, theirs)
    if kind == REGRESSION:
        right = np.array([row.expected.value for row in rows])
        median = float(np.median(right))
        ours, theirs = np.abs(np.array([one.value for one in answers.given]) - right), np.abs(median - right)
        p_value = sign_flip(ours, theirs)
        gained = error_gain(ours, theirs)
        return Reference(name=f"always {median:.4g}", value=float(theirs.mean()), gain=gained, p_value=p_value)
    return None


def judge(reference: Reference) -> str:
    """What a comparison says, in words."""
    if reference.p_value >= _SIGNIFICANT:
        return "no difference is shown"
    return "it is better" if reference.gain.value > 0 else "it is worse"


def is_better(reference: Reference) -> bool:
    """Whether the task is shown to be better."""
    return reference.p_value < _SIGNIFICANT and reference.gain.value > 0


def _flags(rows: Sequence[EvalRow], known: Sequence[str]) -> Flags:
    return np.array([row.expected.text in known for row in rows])


def _by_accuracy(name: str, ours: Flags, theirs: Flags) -> Reference:
    difference, p_value = gain(ours, theirs), mcnemar(ours, theirs)
    return Reference(name=name, value=float(theirs.mean()), gain=difference, p_value=p_value)
