"""Engine on llama.cpp: its KV cache stays inside, and rows are sequences of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.engine import DecodeState, Engine, InputEmbedder, SlotEngine, SlotState, SpeculativeDecodeState
from adalink.runtime.errors import RequestError
from adalink.runtime.generation.admission import FIRST_TOKENS
from adalink.runtime.generation.padding import move_left
from adalink.runtime.implements import implements
from adalink.runtime.llama_cpp.context import BATCH_TOKENS, LlamaModel
from adalink.runtime.llama_cpp.sequences import Sequences, SequenceStates

if TYPE_CHECKING:
    from adalink.runtime.llama_cpp.context import Float32

# Positions whose logits are in llama.cpp's memory at once, beside the result of ``run``.
_LOGITS_AT_ONCE = 256


class LlamaEngine:
    """A GGUF file in llama.cpp. Rows are padded on the right; the padding is not run."""

    def __init__(self, model: LlamaModel, sequences: Sequences, embedder: InputEmbedder, input_scale: float) -> None:
        """Take over the model.

        Args:
            model: the weights, which the sequences free.
            sequences: its sequences.
            embedder: the input embedder.
            input_scale: what embeddings are multiplied by before they are fed, where llama.cpp multiplies them too.
        """
        self.embedder = embedder
        self.profile = None
        self.padding_side = "right"
        self.vocab_size = model.vocab_size
        self.sequences = sequences
        self._scale = np.float32(input_scale)

    @implements(Engine)
    def run(self, feeds: Mapping[str, Array]) -> Array:
        embeds, lengths = self.at_left(feeds)
        logits = np.zeros((int(lengths.sum()), self.vocab_size), np.float32)
        numbers, done = self.sequences.take(1, int(lengths.max())), 0
        try:
            for row, length in zip(embeds, lengths.tolist(), strict=True):
                for start in range(0, length, _LOGITS_AT_ONCE):
                    piece = row[start : min(start + _LOGITS_AT_ONCE, length)]
                    count = len(piece)
                    logits[done : done + count] = self.sequences.decode(
                        piece, numbers * count, range(start, start + count), range(count)
                    )
                    done += count
                self.sequences.cut(numbers[0], 0)
        finally:
            self.sequences.give_back(numbers)
        mask = feeds["attention_mask"]
        if len(logits) == mask.size:
            return logits.reshape(*mask.shape, -1)
        result = np.zeros((*mask.shape, self.vocab_size), np.float32)
        result[mask != 0] = logits
        return result

    @implements(Engine)
    def start(self, feeds: Mapping[str, Array], max_new_tokens: int) -> LlamaDecodeState:
        embeds, lengths = self.at_left(feeds)
        # Larger when that many tokens have come: few rows use their whole limit, which may be any number.
        state = self.open_slots(len(embeds), embeds.shape[1] + min(max_new_tokens, FIRST_TOKENS))
        try:
            state.prefill(embeds, lengths.tolist())
        except BaseException:
            state.close()
            raise
        return state

    @implements(SlotEngine)
    def open_slots(self, slots: int, capacity: int) -> LlamaDecodeState:
        self.sequences.reserve(slots, capacity)
        return LlamaDecodeState(self)

    @implements(Engine)
    def close(self) -> None:
        self.sequences.close()

    def at_left(self, feeds: Mapping[str, Array]) -> tuple[Float32, Array]:
        """Left-aligned embeddings as llama.cpp takes them, and row lengths."""
        embeds, lengths = move_left(feeds["inputs_embeds"], feeds["attention_mask"])
        return self.scaled(embeds), lengths

    def scaled(self, embeds: Array) -> Float32:
        """Embeddings as llama.cpp takes them."""
        return embeds if self._scale == 1 else embeds * self._scale


class LlamaDecodeState:
    """See ``adalink.runtime.engine.SlotState``. A row is a sequence of the engine's, and a number of positions."""

    def __init__(self, engine: LlamaEngine) -> None:
        """A state without rows."""
        self._engine, self._sequences = engine, engine.sequences
        # Sequence and positions of each row; after an adoption the sequences are the adopter's to free.
        self._numbers: list[int] = []
        self._lengths: list[int] = []
        self._is_adopted = False
        self._logits = np.zeros((0, engine.vocab_size), np.float32)

    def prefill(self, embeds: Float32, lengths: Sequence[int]) -> None:
        """Run prompts of shape ``(batch, longest, d)``, left-aligned, in a state without rows."""
        self._numbers += self._sequences.take(len(lengths), max(lengths))
        self._lengths += [0] * len(lengths)
        self._logits = np.zeros((len(lengths), self._engine.vocab_size), np.float32)
        self._run(list(range(len(lengths))), [row[:length] for row, length in zip(embeds, lengths, strict=True)])

    @implements(SlotState)
    def begin(self, states: SequenceStates | None) -> None:
        if states is not None and not isinstance(states, SequenceStates):
            raise RequestError("llama.cpp keeps keys and values to itself: it takes none that others have computed")
        self._numbers += self._sequences.take(1, 0 if states is None else states.length)
        self._lengths.append(0)
        self._logits = np.concatenate([self._logits, np.zeros_like(self._logits, shape=(1, self._logits.shape[1]))])
        if states is not None:
            self._sequences.load(self._numbers[-1], states)
            self._lengths[-1] = states.length

    @implements(SlotState)
    def extend(self, feeds: Mapping[str, Array], start: int, stop: int) -> None:
        embeds, _ = self._engine.at_left(feeds)
        assert self._lengths[-1] == start
        self._run([len(self._numbers) - 1], [embeds[0, start:stop]])

    @implements(SlotState)
    def adopt(self, state: LlamaDecodeState) -> None:
        # The first time without a copy; whoever adopts it again gets copies of what the first has.
        copied, state._is_adopted = state._is_adopted, True
        self._numbers += self._sequences.copy(state._numbers, state._lengths) if copied else state._numbers
        self._lengths += state._lengths
        self._logits = np.concatenate([self._logits, state._logits])

    @implements(SlotState)
    def states(self, row: int, length: int, start: int = 0) -> SequenceStates:
        assert start == 0  # no KV prefix comes before a prompt here
        return SequenceStates(self._sequences.save(self._numbers[row]), length)

    @property
    @implements(DecodeState)
    def logits(self) -> Array:
        return self._logits

    @implements(DecodeState)
    def step(self, inputs_embeds: Array) -> None:
        self._run(list(range(len(self._numbers))), list(self._engine.scaled(inputs_embeds)))

    @implements(SpeculativeDecodeState)
    def verify(self, inputs_embeds: Array) -> Array:
        return self._append(0, self._engine.scaled(inputs_embeds)[0])

    @implements(SpeculativeDecodeState)
    def rollback(self, count: int) -> None:
        self._lengths[0] -= count
        self._sequences.cut(self._numbers[0], self._lengths[0])

    @implements(DecodeState)
    def drop(self, row: int) -> None:
        number = self._numbers[row]
        self._numbers[row], self._lengths[row] = self._numbers[-1], self._lengths[-1]
        self._numbers.pop()
        self._lengths.pop()
        self._logits[row] = self._logits[-1]
        self._logits = self._logits[:-1]
        if not self._is_adopted:
            self._sequences.give_back([number])
        self._is_adopted &= bool(self._numbers)  # without rows it can begin anew

    @implements(DecodeState)
    def close(self) -> None:
        if not self._is_adopted:
            self._sequences.give_back(self._numbers)
        self._numbers, self._lengths = [], []

    def _append(self, row: int, embeds: Float32) -> Array:
        """Append tokens to one row; returns their logits, ``(tokens, vocab)``."""
        start, count = self._lengths[row], len(embeds)
        self._sequences.reserve(0, start + count)
        positions = range(start, start + count)
        logits = self._sequences.decode(embeds, [self._numbers[row]] * count, positions, range(count))
        self._lengths[row] = start + count
        return logits

    def _run(self, rows: list[int], pieces: list[Float32]) -> None:
        """Append tokens to rows, those of all rows together; ``logits`` are then those after the last of each."""
        self._sequences.reserve(
            0, max(self._lengths[row] + len(piece) for row, piece in zip(rows, pieces, strict=True))
        )
        batch: list[tuple[int, Float32]] = []
        size = 0
        for row, piece in zip(rows, pieces, strict=True):
            for start in range(0, len(piece), BATCH_TOKENS):
                part = piece[start : start + BATCH_TOKENS]
                if size + len(part) > BATCH_TOKENS:
                    self._decode(batch)
                    batch, size = [], 0
                batch.append((row, part))
                size += len(part)
        self._decode(batch)

    def _decode(self, batch: list[tuple[int, Float32]]) -> None:
        """One call: tokens behind those of each row."""
        assert not self._is_adopted
        numbers, positions, lasts = list[int](), list[int](), list[int]()
        for row, part in batch:
            numbers += [self._numbers[row]] * len(part)
            positions += range(self._lengths[row], self._lengths[row] + len(part))
            lasts.append(len(numbers) - 1)
        logits = self._sequences.decode(np.concatenate([part for _, part in batch]), numbers, positions, lasts)
        for (row, part), scores in zip(batch, logits, strict=True):
            self._lengths[row] += len(part)
            self._logits[row] = scores
