"""The decode loop: a batch of prompts, each row with its own task, in front of one engine."""

from __future__ import annotations

from functools import partial

import numpy as np

from adalink.runtime.engine import DecodeState, InputEmbedder, SpeculativeDecodeState
from adalink.runtime.generation.sampling import SamplingParams
from adalink.runtime.generation.sequence import SequenceState
from adalink.runtime.generation.speculative_decoding import decode_speculatively
from adalink.runtime.tasks.adapter_mapping import AdapterMapping


def decode(
    state: DecodeState,
    embedder: InputEmbedder,
    tasks: AdapterMapping,
    rows: list[SequenceState],
    sampling: SamplingParams,
    max_new_tokens: int,
    draft_tokens: int = 0,
) -> None:
    """Generate tokens until every row has ended; a row that has ended leaves the batch.

    A step takes one token of each row. Speculative decoding is for the only row of a batch, or the last one left of it,
    where the engine can verify draft tokens.

    Args:
        state: the prompts, after prefill.
        embedder: what generated tokens go through.
        tasks: the task of each row.
        rows: collects each row's tokens.
        sampling: how tokens are chosen.
        max_new_tokens: tokens a row at most.
        draft_tokens: draft tokens of a pass at most; 0 for no speculative decoding.
    """
    alive = list(range(len(rows)))
    generators = sampling.generators(len(rows))
    # Asked once: it takes some 10 µs, which no step should.
    speculative = state if draft_tokens and isinstance(state, SpeculativeDecodeState) else None
    for step in range(max_new_tokens):
        if speculative is not None and len(alive) == 1:
            row, choose = rows[alive[0]], partial(sampling.choose, generator=generators[alive[0]])
            decode_speculatively(speculative, embedder, tasks, row, choose, max_new_tokens - step, draft_tokens)
            return
        logits = state.logits
        chosen = np.empty((len(alive), 1), np.int64)
        for position, index in enumerate(alive):
            chosen[position] = token = sampling.choose(logits[position], generators[index])
            rows[index].push(token)
        kept = _drop_ended(state, [rows[index].finish_reason is not None for index in alive])
        if not kept or step + 1 == max_new_tokens:
            return
        if len(kept) < len(alive):
            alive, chosen, tasks = [alive[position] for position in kept], chosen[kept], tasks.take(kept)
        state.step(embedder.lookup(chosen, tasks))


def _drop_ended(state: DecodeState, ended: list[bool]) -> list[int]:
    """Drop the rows that have ended; the former positions of the others in the batch, in their new order."""
    kept = list(range(len(ended)))
    # From the end, so that a row that takes another's place has been looked at.
    for position in reversed(range(len(ended))):
        if ended[position]:
            state.drop(position)
            kept[position] = kept[-1]
            kept.pop()
    return kept
