"""Outputs of rows that the reference ran lately, for rows that begin as they do.

A decoder sees no later token, so the outputs of a row are the first ones of any row that goes on from it. The same
prompts are generated from alone, in mixed batches and beside others, and PyTorch runs once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from adalink.tools.parity.reference.noise_floor import Outputs

_MOST_ROWS, _MOST_BYTES = 8, 192 << 20


@dataclass(frozen=True)
class RowKey:
    """A row whose last tokens were generated.

    Attributes:
        prompt: what every generated token sees: the prompt, or the encoder's tokens.
        generated: the generated tokens, each of which sees the ones before it.
    """

    prompt: tuple[int, ...]
    generated: tuple[int, ...]

    def is_beginning_of(self, other: RowKey) -> bool:
        """Whether another row goes on from this one."""
        return self.prompt == other.prompt and self.generated == other.generated[: len(self.generated)]


class KnownOutputs:
    """The latest rows, as many as memory is set aside for."""

    def __init__(self) -> None:
        self._rows: dict[RowKey, Outputs] = {}

    def find(self, row: RowKey) -> Outputs | None:
        """Outputs of a row, if it or a longer one is known."""
        for known, outputs in self._rows.items():
            if row.is_beginning_of(known):
                missing = len(known.generated) - len(row.generated)
                values, noise = dict(outputs.values), dict(outputs.noise)
                for arrays in (values, noise):  # an encoder's states are those of the prompt, which is the same
                    arrays["logits"] = arrays["logits"][: len(arrays["logits"]) - missing]
                return Outputs(values, noise)
        return None

    def add(self, row: RowKey, outputs: Outputs) -> None:
        """Keep a row, and let go of the oldest beyond some."""
        self._rows[row] = outputs
        while len(self._rows) > 1 and (len(self._rows) > _MOST_ROWS or self._bytes() > _MOST_BYTES):
            del self._rows[next(iter(self._rows))]

    def _bytes(self) -> int:
        return sum(array.nbytes for outputs in self._rows.values() for array in outputs.values.values())

    def clear(self) -> None:
        """Forget all rows: the reference computes otherwise from now on."""
        self._rows.clear()
