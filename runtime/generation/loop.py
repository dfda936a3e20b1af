"""Decode loop: a batch of prompts on one engine, each row with its own task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adalink.runtime.engine import DecodeState, InputEmbedder, SpeculativeDecodeState
from adalink.runtime.generation.sequence import SequenceState
from adalink.runtime.generation.speculative_decoding import decode_speculatively
from adalink.runtime.generation.token_chooser import TokenChooser
from adalink.runtime.tasks.adapter_mapping import AdapterMapping


def decode(
    state: DecodeState,
    embedder: InputEmbedder,
    tasks: AdapterMapping,
    rows: list[SequenceState],
    choosers: Sequence[TokenChooser],
    max_new_tokens: int,
    draft_tokens: int = 0,
) -> None:
    """Generate tokens until every row has ended; a finished row leaves the batch.

    A step appends one token to each row. Speculative decoding starts when a single row is left, if the engine can
    verify draft tokens.

    Args:
        state: decode state of the batch, after prefill.
        embedder: embeds generated tokens.
        tasks: adapter mapping of the rows.
        rows: sequence state of each row; collects its tokens.
        choosers: chooses the tokens of each row.
        max_new_tokens: most new tokens of a row.
        draft_tokens: most draft tokens of a pass; 0 turns speculative decoding off.

    Raises:
        BackendError: the engine refused, or its logits are not numbers.
        RequestError: logits processors ban every token.
    """
    alive = list(range(len(rows)))
    # Checked once: the protocol check takes about 10 µs, too much for a step.
    speculative = state if draft_tokens and isinstance(state, SpeculativeDecodeState) else None
    for step in range(max_new_tokens):
        if speculative is not None and len(alive) == 1:
            row, choose = rows[alive[0]], choosers[alive[0]]
            decode_speculatively(speculative, embedder, tasks, row, choose, max_new_tokens - step, draft_tokens)
            return
        logits = state.logits
        chosen = np.empty((len(alive), 1), np.int64)
        for position, index in enumerate(alive):
            chosen[position] = token = choosers[index](logits[position])
            rows[index].push(token)
        kept = _drop_ended(state, [rows[index].finish_reason is not None for index in alive])
        if not kept or step + 1 == max_new_tokens:
            return
        if len(kept) < len(alive):
            alive, chosen, tasks = [alive[position] for position in kept], chosen[kept], tasks.take(kept)
        state.step(embedder.lookup(chosen, tasks))


def _drop_ended(state: DecodeState, ended: list[bool]) -> list[int]:
    """Drop finished rows; returns the former indices of the remaining rows, in their new order."""
    kept = list(range(len(ended)))
    # From the end: a row that moves to a lower index has been checked already.
    for position in reversed(range(len(ended))):
        if ended[position]:
            state.drop(position)
            kept[position] = kept[-1]
            kept.pop()
    return kept
