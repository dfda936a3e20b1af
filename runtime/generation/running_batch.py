"""Running batch: the rows that decode together, their decode state, and the decode steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.engine import DecodeState, InputEmbedder, SlotState, SpeculativeDecodeState
from adalink.runtime.generation.row import Row
from adalink.runtime.tasks.adapter_mapping import AdapterMapping, combine


class RunningBatch:
    """Rows after their prompts were read, each with a chosen token that the next step runs.

    Attributes:
        rows: the rows, in the order of the decode state.
    """

    def __init__(self, embedder: InputEmbedder) -> None:
        """``embedder`` embeds generated tokens."""
        self.rows: list[Row] = []
        self._embedder = embedder
        self._state: DecodeState | None = None
        self._speculative: SpeculativeDecodeState | None = None
        self._tasks: AdapterMapping | None = None

    @property
    def has_state(self) -> bool:
        """Whether there is a decode state, with rows or without."""
        return self._state is not None

    @property
    def can_speculate(self) -> bool:
        """Whether the next tokens can be drafted: a single row, on an engine that verifies draft tokens."""
        return self._speculative is not None and len(self.rows) == 1 and self.rows[0].options.draft_tokens > 0

    def open(self, state: DecodeState) -> None:
        """Take a decode state without rows, or with the rows that ``add`` names next."""
        self._state = state
        # Checked once: the protocol check takes about 10 µs, too much for a step.
        self._speculative = state if isinstance(state, SpeculativeDecodeState) else None

    def add(self, rows: Sequence[Row], state: DecodeState) -> bool:
        """Add rows whose prompts ``state`` has read, and choose their first tokens.

        Returns:
            Whether ``state`` was copied and is the caller's again; if not, it is the batch's own.

        Raises:
            RequestError: there is no memory for them; the batch is as before.
        """
        is_copied = self._state is not None and self._state is not state
        if self._state is None:
            self.open(state)
        elif is_copied:
            slots: SlotState = self._state  # type: ignore[assignment]  # only such engines have two states at once
            slots.adopt(state)
        self.rows += rows
        self._tasks = None
        assert self._state is not None
        logits = self._state.logits
        for index in range(len(self.rows) - len(rows), len(self.rows)):
            self.rows[index].choose(logits[index])
        return is_copied

    def step(self) -> None:
        """Run the chosen token of every row, and choose the next ones; raises ``BackendError``."""
        assert self._state is not None
        tokens = np.array([[row.next_token] for row in self.rows])
        self._state.step(self._embedder.lookup(tokens, self._mapping()))
        for row, logits in zip(self.rows, self._state.logits, strict=True):
            row.choose(logits)

    def speculate(self) -> None:
        """Run the only row's chosen token and the draft tokens after it in one pass; raises ``BackendError``.

        Tokens and random numbers are those of single-token steps: the chooser is asked for each token only after those
        before it, so logits processors see the accepted text alone.
        """
        row, state = self.rows[0], self._speculative
        assert state is not None
        draft = row.lookup.draft(row.tokens_left - 1)
        logits = state.verify(self._embedder.lookup(np.array([[row.next_token, *draft]]), self._mapping()))
        for accepted, scores in enumerate(logits):
            row.choose(scores)
            if row.is_ended:
                return
            if accepted == len(draft) or row.next_token != draft[accepted]:
                break
        state.rollback(len(draft) - accepted)
        row.lookup.update(len(draft), accepted)

    def remove(self, is_over: Callable[[Row], bool], finish: Callable[[Row, int], None]) -> None:
        """Remove rows.

        Args:
            is_over: whether a row is to leave.
            finish: called with each such row and its index before its cache is gone.
        """
        # From the end: a row that moves to a lower index has been looked at already.
        for index in reversed(range(len(self.rows))):
            if not is_over(self.rows[index]):
                continue
            finish(self.rows[index], index)
            assert self._state is not None
            self._state.drop(index)
            self.rows[index] = self.rows[-1]
            self.rows.pop()
            self._tasks = None

    def states(self, index: int, length: int, start: int) -> Array:
        """A copy of the keys and values of a row's positions ``start`` to ``length``; see ``SlotState.states``."""
        slots: SlotState = self._state  # type: ignore[assignment]  # only asked of such engines
        return slots.states(index, length, start)

    def close(self) -> list[Row]:
        """Free the decode state; returns the rows that were left."""
        rows, state = self.rows, self._state
        self.rows, self._state, self._speculative, self._tasks = [], None, None, None
        if state is not None:
            state.close()
        return rows

    def _mapping(self) -> AdapterMapping:
        """The adapter mapping of the rows' generated tokens."""
        if self._tasks is None:
            self._tasks = self._embedder.for_decoding(combine([row.generated_tasks for row in self.rows]))
        return self._tasks
