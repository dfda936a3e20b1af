"""The head of a task: from an encoder's states to a score for each label, in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adalink.runtime.arrays import Array
from adalink.runtime.pooling import pool
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.head_spec import HEAD_BIAS, HEAD_WEIGHT, Head


@dataclass(frozen=True, eq=False)
class TaskHead:
    """The head of one task.

    Attributes:
        spec: labels and pooling.
        weight: float32 with shape ``(labels, d)``.
        bias: float32 with shape ``(labels,)``.
    """

    spec: Head
    weight: Array
    bias: Array

    def scores(self, states: Array) -> npt.NDArray[np.float64]:
        """A score for each label: of the text, ``(labels,)``, or of each token, ``(tokens, labels)``.

        Args:
            states: hidden states of the text's tokens, float32 with shape ``(tokens, d)``.
        """
        features = pool(states, [self.spec.pooling]) if self.spec.pooling else states
        return np.asarray(features.astype(np.float64) @ self.weight.T.astype(np.float64) + self.bias)


def head_of(adapter: Adapter) -> TaskHead | None:
    """The head of an adapter, if it has one."""
    spec = adapter.config.head
    return None if spec is None else TaskHead(spec, adapter.weights[HEAD_WEIGHT], adapter.weights[HEAD_BIAS])
