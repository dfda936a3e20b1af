"""Head of a task on an encoder: labels, and how the encoder's states become a score for each of them."""

from __future__ import annotations

import msgspec

from adalink.runtime.storage.pooling_schema import POOLING_MODES

# Names as in transformers, which has no fourth.
SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"
REGRESSION, TOKENS = "regression", "token_classification"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION, TOKENS)
OUTSIDE = "O"
HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"
_MOST_LABELS, _MOST_TOKENS = 1 << 16, 1 << 20


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A linear head: one score for each label, ``weight @ states + bias``.

    Attributes:
        problem_type: one of ``PROBLEM_TYPES``.
        labels: name of each row of ``weight``. For tokens they are tags: ``"O"`` first, then ``"B-..."`` and
            ``"I-..."`` of each kind of span. For a regression, the one quantity.
        pooling: one of ``POOLING_MODES``; empty for tokens, each of which has its own scores.
        max_tokens: tokens to which a text, or a pair of texts, is cut, as in training.
    """

    problem_type: str
    labels: tuple[str, ...]
    pooling: str = ""
    max_tokens: int


def fault_in_head(head: Head) -> str | None:
    """What is wrong with a head, in words; ``None`` if nothing."""
    kind, labels = head.problem_type, head.labels
    if kind not in PROBLEM_TYPES:
        return f"head.problem_type is {kind!r}, expected one of {', '.join(PROBLEM_TYPES)}"
    least = {SINGLE_LABEL: 2, TOKENS: 2}.get(kind, 1)
    most = 1 if kind == REGRESSION else _MOST_LABELS
    if not least <= len(labels) <= most or len(set(labels)) != len(labels) or not all(labels):
        return f"head.labels are {str(labels)[:80]}, expected {least} to {most} different names for {kind}"
    if kind == TOKENS and (labels[0] != OUTSIDE or not _are_tags(labels[1:])):
        return f"head.labels are {str(labels)[:80]}, expected 'O', and 'B-NAME' and 'I-NAME' of each name"
    known = ("",) if kind == TOKENS else POOLING_MODES
    if head.pooling not in known:
        return f"head.pooling is {head.pooling!r}, expected one of {', '.join(map(repr, known))} for {kind}"
    if not 1 <= head.max_tokens <= _MOST_TOKENS:
        return f"head.max_tokens is {head.max_tokens}, expected 1 to {_MOST_TOKENS}"
    return None


def _are_tags(tags: tuple[str, ...]) -> bool:
    names = {tag[2:] for tag in tags}
    return all(names) and set(tags) == {f"{begin}-{name}" for name in names for begin in "BI"}
