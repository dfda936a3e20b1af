"""Closed batches: admission for engines that take no new rows between steps."""

from __future__ import annotations

from adalink.runtime.errors import RequestError
from adalink.runtime.generation.admission import DEFAULT_SLOTS, Runner, fail_all
from adalink.runtime.generation.prompt import collate
from adalink.runtime.generation.row import Row
from adalink.runtime.generation.running_batch import RunningBatch
from adalink.runtime.generation.waiting_queue import WaitingQueue
from adalink.runtime.storage.manifest import Base


class ClosedAdmission:
    """The next batch begins when the last row has ended; see ``Admission``."""

    is_reading = False

    def __init__(self, runner: Runner, base: Base, slots: int | None) -> None:
        self._runner, self._base = runner, base
        profile = runner.engine.profile
        limits = [slots or DEFAULT_SLOTS] + ([] if profile is None else [profile.batch.max])
        self._slots = min(limits)
        self._capacity = None if profile is None or base.kind == "encoder-decoder" else profile.capacity

    def admit(self, batch: RunningBatch, waiting: WaitingQueue) -> None:
        """See ``Admission.admit``."""
        if batch.rows:
            return
        rows: list[Row] = []
        longest = budget = 0
        while len(rows) < self._slots and (row := waiting.take()) is not None:
            longest, budget = max(longest, row.prompt.length), max(budget, row.prompt.max_new_tokens)
            if rows and self._capacity is not None and longest + budget > self._capacity:
                waiting.put_back(row)  # each fits alone, but not side by side
                break
            rows.append(row)
        if rows:
            self._start(batch, rows, waiting)

    def leave(self, batch: RunningBatch, row: Row, index: int) -> None:
        """See ``Admission.leave``: nothing can be used again."""

    def close(self) -> list[Row]:
        """See ``Admission.close``."""
        return []

    def _start(self, batch: RunningBatch, rows: list[Row], waiting: WaitingQueue) -> None:
        prompts = [row.prompt for row in rows]
        try:
            collated = collate(prompts, self._base.pad_token_id, self._runner.engine.padding_side)
            state = self._runner.start(collated, max(prompt.max_new_tokens for prompt in prompts))
        except Exception as error:
            if isinstance(error, RequestError) and len(rows) > 1:  # the engine takes fewer such rows at once
                for row in reversed(rows[1:]):
                    waiting.put_back(row)
                self._start(batch, rows[:1], waiting)
            else:
                fail_all(rows, error)
            return
        batch.close()
        batch.add(rows, state)
