"""Admission: which waiting prompts are read before the next decode step.

A step of the running batch waits for what is read before it. Between two steps about ``STEP_TOKENS`` positions of
prompts are read, so that nobody's text stops for long; a longer prompt is read in pieces. The more rows wait, the more
is read, up to one pass; while no row decodes, larger pieces are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.batch_inputs import BatchInputs
from adalink.runtime.engine import DecodeState, Engine, EngineInput, InputEmbedder, SlotEngine, SlotState
from adalink.runtime.generation.prefix_cache import PrefixCache, PrefixKey
from adalink.runtime.generation.prompt import PromptBatch, collate
from adalink.runtime.generation.row import Row
from adalink.runtime.generation.running_batch import RunningBatch
from adalink.runtime.generation.waiting_queue import WaitingQueue
from adalink.runtime.storage.manifest import Base
from adalink.runtime.tasks.soft_prompt import SoftPromptLayout

# Positions of prompts that are read between two decode steps, and while no row decodes.
STEP_TOKENS, IDLE_TOKENS = 48, 2048
# Positions of a single pass over prompts: attention's memory grows with their square, and rows that decode wait for it.
PASS_TOKENS = 512
# Rows of a batch where nobody says; and new tokens for which a cache has room at first.
DEFAULT_SLOTS, FIRST_TOKENS = 64, 4096


class Runner(Protocol):
    """What reads prompts; see ``adalink.runtime.model_runner.ModelRunner``."""

    @property
    def engine(self) -> Engine:
        """The engine that reads prompts."""
        ...

    @property
    def slot_engine(self) -> SlotEngine | None:
        """The same engine, if rows may join its batch at any step."""
        ...

    @property
    def prefixes(self) -> PrefixCache | None:
        """The prefix cache, if it is on."""
        ...

    @property
    def embedder(self) -> InputEmbedder:
        """The input embedder of generated tokens."""
        ...

    def feeds(self, inputs: BatchInputs, layout: SoftPromptLayout) -> Mapping[str, EngineInput]:
        """The engine's inputs for whole prompts."""
        ...

    def start(self, batch: PromptBatch, max_new_tokens: int) -> DecodeState:
        """Read prompts and keep their KV cache."""
        ...

    def prefix_key(self, batch: PromptBatch) -> tuple[PrefixKey, Array]:
        """Prefix cache key of a batch of one prompt, and of each of its positions."""
        ...


class Admission(Protocol):
    """Reads waiting prompts into the running batch."""

    @property
    def is_reading(self) -> bool:
        """Whether a prompt has been read in part."""
        ...

    def admit(self, batch: RunningBatch, waiting: WaitingQueue) -> None:
        """Read prompts that wait, and add their rows to the batch; rows whose prompts cannot be read fail."""
        ...

    def leave(self, batch: RunningBatch, row: Row, index: int) -> None:
        """A row leaves the batch: keep what later prompts can use."""
        ...

    def close(self) -> list[Row]:
        """Forget what has been read in part; returns its rows."""
        ...


class SlotAdmission:
    """For engines whose batch takes new rows at any step."""

    def __init__(self, runner: Runner, engine: SlotEngine, base: Base, slots: int | None, capacity: int | None) -> None:
        """``slots`` and ``capacity`` are those of ``Scheduler``."""
        self._runner, self._engine, self._base = runner, engine, base
        self._slots = slots or DEFAULT_SLOTS
        self._capacity = capacity
        self._reading: _Reading | None = None
        self._spare: _Spare | None = None
        self._is_others_turn = False

    @property
    def is_reading(self) -> bool:
        """See ``Admission.is_reading``."""
        return self._reading is not None

    def admit(self, batch: RunningBatch, waiting: WaitingQueue) -> None:
        """See ``Admission.admit``."""
        if self._capacity is not None and not batch.has_state:
            batch.open(self._engine.open_slots(self._slots, self._capacity))
        # A step takes about as long over few rows as over many, and short passes are slow ones: where rows wait,
        # tokens a second are won by reading more.
        behind = max(len(waiting) + self.is_reading - 1, 0)
        left = min(STEP_TOKENS * (1 + 2 * behind), PASS_TOKENS) if batch.rows else IDLE_TOKENS
        # Where others wait behind a long prompt, they come first every second time.
        self._is_others_turn = not self._is_others_turn and len(waiting) > 0
        if self._reading is not None and not self._is_others_turn:
            left -= self._read_on(batch, left)
        together: list[Row] = []
        while left > 0 and len(batch.rows) + len(together) + self.is_reading < self._slots:
            row = waiting.take()
            if row is None:
                break
            is_short = row.prompt.read_length <= min(PASS_TOKENS, max(left, STEP_TOKENS))
            is_free = self._reading is None
            # Looked up for long prompts too, but not while one waits for another to be read.
            if (is_short or is_free) and not self._begins_in_cache(row) and is_short:
                together.append(row)
                left -= row.prompt.read_length
            elif is_free:
                self._reading = self._begin(row, batch)
                left -= self._read_on(batch, left)
            else:
                waiting.put_back(row)
                break
        self._read_together(batch, together)

    def leave(self, batch: RunningBatch, row: Row, index: int) -> None:
        """See ``Admission.leave``: the next turn of a chat begins with this prompt and its reply."""
        prefixes = self._runner.prefixes
        # Under the scope "prompt" a token of a reply has other keys and values than the same token of a prompt.
        if prefixes is None or row.handle.is_failed or not row.run_tokens or row.prefix_key.scope == "prompt":
            return
        keys = np.concatenate([row.prefix_positions, np.array(row.run_tokens, np.int64)])
        length = row.prompt.length + len(row.run_tokens)
        prefixes.add(row.prefix_key, keys, batch.states(index, length, length - len(keys)))

    def close(self) -> list[Row]:
        """See ``Admission.close``."""
        reading, self._reading, self._spare = self._reading, None, None
        return [] if reading is None else [reading.row]

    def _begins_in_cache(self, row: Row) -> bool:
        """Whether keys and values come before what is read: a KV prefix, or what the prefix cache knows; notes that."""
        has_kv_prefix, prefixes = row.prompt.kv_prefix is not None, self._runner.prefixes
        if prefixes is None:
            return has_kv_prefix
        row.prefix_key, row.prefix_positions = self._runner.prefix_key(self._collate([row]))
        row.prefix = prefixes.find(row.prefix_key, row.prefix_positions)
        return has_kv_prefix or row.prefix is not None

    def _begin(self, row: Row, batch: RunningBatch) -> _Reading | None:
        """Begin to read a prompt by itself; ``None`` if it cannot be read."""
        state: SlotState | None = None
        try:
            collated = self._collate([row])
            state = self._open_one(row, batch)
            state.begin(row.initial_states)
            done = 0 if row.prefix is None else row.prefix.shape[2]
            row.cached_tokens, row.prefix = done, None
            return _Reading(row, self._runner.feeds(collated.inputs, collated.layout), state, done)
        except Exception as error:
            if state is not None:
                state.close()
            row.fail(error)
            return None

    def _open_one(self, row: Row, batch: RunningBatch) -> SlotState:
        """A decode state for a prompt that is read by itself: the one of the prompt before, where it is large enough.

        Memory that is used for the first time costs more than to read a piece of a prompt.
        """
        length, spare = row.prompt.length, self._spare
        self._spare = None
        if batch.has_state and spare is not None and spare.capacity >= length:
            return spare.state
        room = 0 if batch.has_state else min(row.prompt.max_new_tokens, FIRST_TOKENS)  # it becomes the batch's
        return self._engine.open_slots(1, _spare_capacity(length + room))

    def _read_on(self, batch: RunningBatch, most: int) -> int:
        """Read the next piece of the prompt that is being read; returns its positions."""
        reading = self._reading
        if reading is None:
            return 0
        row, length = reading.row, reading.row.prompt.read_length
        if row.stop_if_over():
            self._reading = None
            reading.state.close()
            return 0
        rest = length - reading.done
        most = max(1, min(most, PASS_TOKENS))
        # Pieces of about one length: a pass over a few positions takes as long as a decode step.
        size = -(-rest // -(-rest // most))
        try:
            reading.state.extend(reading.feeds, reading.done, reading.done + size)
            reading.done += size
            if reading.done == length:
                self._reading = None
                self._keep_prompt(row, reading.state, 0)
                if batch.add([row], reading.state):
                    reading.state.drop(0)
                    self._spare = _Spare(reading.state, _spare_capacity(row.prompt.length))
        except Exception as error:
            self._reading = None
            reading.state.close()
            row.fail(error)
        return size

    def _read_together(self, batch: RunningBatch, rows: list[Row]) -> None:
        """Read whole prompts, those of similar lengths in one pass."""
        groups = by_length(rows)
        if len(groups) > 1 and not batch.has_state:
            capacity = max(row.prompt.length + min(row.prompt.max_new_tokens, FIRST_TOKENS) for row in rows)
            batch.open(self._engine.open_slots(len(rows), capacity))
        for group in groups:
            room = 1 if batch.has_state else max(row.prompt.max_new_tokens for row in group)
            state: DecodeState | None = None
            try:
                state = self._runner.start(self._collate(group), room)
                for index, row in enumerate(group):
                    self._keep_prompt(row, state, index)
                if batch.add(group, state):
                    state.close()
            except Exception as error:
                if state is not None:
                    state.close()
                fail_all(group, error)

    def _keep_prompt(self, row: Row, state: DecodeState, index: int) -> None:
        """Keep a prompt's keys and values for later prompts."""
        if self._runner.prefixes is not None and len(row.prefix_positions) > row.cached_tokens + 1:
            slots: SlotState = state  # type: ignore[assignment]  # what a ``SlotEngine`` starts
            length = row.prompt.length
            states = slots.states(index, length, length - len(row.prefix_positions))
            self._runner.prefixes.add(row.prefix_key, row.prefix_positions, states)

    def _collate(self, rows: Sequence[Row]) -> PromptBatch:
        return collate([row.prompt for row in rows], self._base.pad_token_id, self._runner.engine.padding_side)


@dataclass
class _Reading:
    """A prompt that has been read in part, in a decode state of its own.

    Attributes:
        row: its row.
        feeds: the engine's inputs for the whole prompt.
        state: a decode state with its row alone.
        done: positions of it that have been read, or were in the prefix cache.
    """

    row: Row
    feeds: Mapping[str, EngineInput]
    state: SlotState
    done: int


@dataclass
class _Spare:
    """A decode state without a row, for the next prompt that is read by itself.

    Attributes:
        state: the decode state.
        capacity: positions for which it has memory, at least.
    """

    state: SlotState
    capacity: int


def _spare_capacity(length: int) -> int:
    """Positions of a decode state for prompts of about this length: whole passes."""
    return -(-length // PASS_TOKENS) * PASS_TOKENS


def by_length(rows: Sequence[Row]) -> list[list[Row]]:
    """Groups of rows that lose little by padding: no prompt is much shorter than the longest of its group."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.prompt.length):
        group = groups[-1] if groups else []
        fits = group and row.prompt.length <= group[0].prompt.length * 5 // 4 + 8
        if fits and row.prompt.length * (len(group) + 1) <= IDLE_TOKENS:
            group.append(row)
        else:
            groups.append([row])
    return groups


def fail_all(rows: Sequence[Row], error: BaseException) -> None:
    """End rows with one error."""
    for row in rows:
        row.fail(error)
