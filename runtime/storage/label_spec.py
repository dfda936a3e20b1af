"""Labels of a task on a base that generates: the completions that its rows have, and nothing else."""

from __future__ import annotations

import msgspec

_MOST_LABELS = 1 << 12


class LabelSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The labels of a task that says them as text.

    Attributes:
        completions: what follows the prompt, as in training: ``(" oil", " grain")``. The name of a label is its
            completion without white space at the ends.
    """

    completions: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each label."""
        return tuple(text.strip() for text in self.completions)


def fault_in_labels(labels: LabelSet) -> str | None:
    """What is wrong with a set of labels, in words; ``None`` if nothing."""
    names = labels.names
    if not 2 <= len(names) <= _MOST_LABELS or len(set(names)) != len(names) or not all(names):
        shown = str(labels.completions)[:80]
        return f"labels are {shown}, expected 2 to {_MOST_LABELS} different texts, white space at their ends aside"
    return None
