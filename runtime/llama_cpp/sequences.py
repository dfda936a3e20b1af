"""Sequences: one KV cache inside llama.cpp, whose sequences the decode states of an engine share.

A decode state holds sequences by number, so rows go from one state to another without a copy. The cache grows where
they need more: a larger context takes over what the sequences hold.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from adalink.runtime.errors import RequestError
from adalink.runtime.llama_cpp.context import MOST_SEQUENCES, Bytes, Float32, LlamaContext, LlamaModel


@dataclass(frozen=True, eq=False)
class SequenceStates:
    """Keys and values of the first positions of a sequence, as ``SlotState.states`` gives them.

    llama.cpp keeps their form to itself. So this is an array in two regards alone: the size of its third axis, and its
    beginnings along that.

    Attributes:
        data: those of the whole sequence, in llama.cpp's own form.
        length: how many positions count.
    """

    data: Bytes
    length: int

    @property
    def nbytes(self) -> int:
        """Size of ``data``."""
        return self.data.nbytes

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Size 1 but for the third axis, that of positions."""
        return 1, 1, self.length, 1

    def __getitem__(self, key: tuple[slice, slice, slice]) -> SequenceStates:
        """``states[:, :, :length]``: those of the first ``length`` positions; they share ``data``."""
        start, stop, step = key[2].indices(self.length)
        if key[:2] != (slice(None), slice(None)) or start or step != 1:
            raise IndexError(f"only states[:, :, :length] is there, asked for {key}")
        return SequenceStates(self.data, stop)


class Sequences:
    """The sequences of one engine; safe for several threads."""

    def __init__(self, model: LlamaModel, threads: int, cache_type: int, longest: int | None) -> None:
        """Prepare them; memory is taken at the first use.

        Args:
            model: the weights.
            threads: threads of llama.cpp.
            cache_type: ggml's type of keys and values.
            longest: positions of the longest sequence of the model.
        """
        self._model, self._threads, self._cache_type, self._longest = model, threads, cache_type, longest
        self._context: LlamaContext | None = None
        self._held: set[int] = set()
        self._lock = threading.RLock()

    def reserve(self, sequences: int, capacity: int) -> None:
        """Take memory for so many more sequences, of so many positions; raises ``RequestError`` if there is none."""
        with self._lock:
            context, needed = self._context, len(self._held) + sequences
            slots, positions = (0, 1) if context is None else (context.sequences, context.capacity)
            if context is not None and needed <= slots and capacity <= positions:
                return
            if needed > MOST_SEQUENCES:
                raise RequestError(
                    f"llama.cpp decodes {MOST_SEQUENCES} sequences at most, and {needed} are asked for: open the "
                    "deployment with fewer slots, or send fewer rows"
                )
            if self._held and needed > slots:
                needed = min(MOST_SEQUENCES, max(needed, 2 * slots))
            if self._held and capacity > positions:
                capacity = max(capacity, min(2 * positions, self._longest or 2 * positions))
            self._grow(max(needed, slots, 1), max(capacity, positions))

    def take(self, count: int, capacity: int) -> list[int]:
        """Numbers of so many free sequences, without positions; raises as ``reserve`` does."""
        with self._lock:
            self.reserve(count, capacity)
            free = [number for number in range(self._opened().sequences) if number not in self._held][:count]
            self._held.update(free)
            return free

    def give_back(self, numbers: Sequence[int]) -> None:
        """Free sequences with what they hold; the memory stays, since taking it anew would cost as much as a prompt."""
        with self._lock:
            for number in numbers:
                self._held.discard(number)
                if self._context is not None:
                    self._context.cut(number)

    def decode(
        self, embeds: npt.NDArray[Any], numbers: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> Float32:
        """See ``LlamaContext.decode``."""
        with self._lock:
            return self._opened().decode(embeds, numbers, positions, wanted)

    def cut(self, number: int, length: int) -> None:
        """See ``LlamaContext.cut``."""
        with self._lock:
            self._opened().cut(number, length)

    def save(self, number: int) -> Bytes:
        """See ``LlamaContext.save``."""
        with self._lock:
            return self._opened().save(number)

    def load(self, number: int, states: SequenceStates) -> None:
        """Give a sequence without positions those of ``states``."""
        with self._lock:
            self._opened().load(number, states.data, states.length)

    def copy(self, numbers: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Numbers of as many free sequences, which then hold the first positions of others.

        Raises:
            RequestError: as ``reserve`` does.
            BackendError: a sequence has fewer positions.
        """
        with self._lock:
            copies = self.take(len(numbers), max(lengths))
            try:
                for number, to, length in zip(numbers, copies, lengths, strict=True):
                    self._opened().copy(number, to, length)
            except BaseException:
                self.give_back(copies)
                raise
            return copies

    def close(self) -> None:
        """Free the memory, and the model: nobody is to make a cache of it in between."""
        with self._lock:
            self._free()
            self._model.close()

    def _free(self) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None

    def _opened(self) -> LlamaContext:
        if self._context is None:
            raise RequestError("the deployment is closed: open it again")
        return self._context

    def _grow(self, sequences: int, capacity: int) -> None:
        """Move all sequences to a larger context; without any, the smaller one goes first."""
        if not self._held:
            self._free()
        before = self._context
        if self._model.handle is None:
            raise RequestError("the deployment is closed: open it again")
        larger = LlamaContext(self._model, sequences, capacity, self._threads, self._cache_type)
        if before is not None:
            try:
                for number in self._held:
                    if before.length(number):
                        larger.load(number, before.save(number), before.length(number))
            except BaseException:
                larger.close()
                raise
            before.close()
        self._context = larger
