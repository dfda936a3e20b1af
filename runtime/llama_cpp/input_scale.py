"""What llama.cpp does with embeddings that it is fed, found by trying: nothing, or the scale of Gemma once more.

Some architectures multiply embeddings in the graph, whether llama.cpp has looked them up or was fed them. The kit's
table holds them multiplied already. So a few tokens are run by their ids, and by their rows of the table. The same
logits show that the table belongs to the file, too.
"""

from __future__ import annotations

import math

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.errors import ContractError
from adalink.runtime.llama_cpp.sequences import Sequences
from adalink.runtime.storage.embedding_table import EmbeddingTable

_TOKENS = 4
# Largest deviation of logits, as a share of their spread. Equal inputs give equal logits; a scale that is divided out
# and multiplied in again rounds. Another table or scale deviates by as much as the logits themselves.
_CLOSE = 0.1


def find_input_scale(sequences: Sequences, table: EmbeddingTable, origin: str) -> float:
    """What rows of the table are multiplied by before they are fed.

    Args:
        sequences: of the open model.
        table: the base's embedding table.
        origin: the file, for messages.

    Raises:
        ContractError: llama.cpp computes something else from the table's rows than from the tokens.
    """
    ids = np.arange(_TOKENS) * (len(table) // _TOKENS) + len(table) // (2 * _TOKENS)
    rows = np.asarray(table.take(ids), np.float32)
    (number,) = numbers = sequences.take(1, _TOKENS)

    def logits(inputs: Array) -> Array:
        sequences.cut(number, 0)
        return sequences.decode(inputs, numbers * _TOKENS, range(_TOKENS), [_TOKENS - 1])

    try:
        expected, apart = logits(ids), math.inf
        for scale in (1.0, 1 / math.sqrt(rows.shape[1])):
            apart = float(np.abs(logits(rows * np.float32(scale)) - expected).max() / expected.std())
            if apart <= _CLOSE:
                return scale
    finally:
        sequences.give_back(numbers)
    raise ContractError(
        f"{origin}: llama.cpp computes other logits from the deployment's embeddings than from the tokens, {apart:.1g} "
        "of their spread away: the table is another model's, or the model looks up more than embeddings"
    )
