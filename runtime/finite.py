"""Outputs that are not numbers: an engine's logits and hidden states are checked where they are read.

Among logits minus infinity is a number that some models give to tokens they exclude. NaN and infinity are none. A row
without a single finite logit says nothing, and neither does one whose logits are all equal: a norm after an overflow
divides by infinity, and zeros are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.errors import BackendError

_REPAIR = (
    "the base or the task overflows in this dtype, or the checkpoint holds weights that are not numbers: run 'adalink "
    "verify', try another task, and export the base in float32 or from an intact checkpoint"
)


def row_label(row: int, tasks: str | Sequence[str | None] | None) -> str:
    """How a message calls a row of a request, such as ``row 2 (task 'topics')``."""
    names = [tasks] * (row + 1) if tasks is None or isinstance(tasks, str) else list(tasks)
    if row >= len(names):  # an iterator, which is used up
        return f"row {row}"
    return f"row {row} (base model)" if names[row] is None else f"row {row} (task {names[row]!r})"


def not_numbers(what: str, value: float, label: str, where: str) -> BackendError:
    """The error for outputs that are not numbers, of which ``value`` is one."""
    got = "NaN" if math.isnan(value) else "infinity" if value > 0 else "minus infinity alone"
    if what != "logits" and value < 0:
        got = "minus infinity"
    return BackendError(f"{label}: the engine's {what} {where} hold {got}, expected numbers: {_REPAIR}")


def all_equal(what: str, value: float, label: str, where: str) -> BackendError:
    """The error for outputs that are all ``value``."""
    return BackendError(
        f"{label}: the engine's {what} {where} are all {value:g}, expected different numbers: {_REPAIR}"
    )


def check_image_embeds(embeds: Array) -> Array:
    """Check what a vision tower computed; returns it, or raises ``BackendError`` if it is not numbers."""
    if not np.isfinite(embeds).all():
        raise BackendError(f"the vision tower's image embeddings hold NaN or infinity, expected numbers: {_REPAIR}")
    return embeds


def check_outputs(
    outputs: dict[str, Array],
    mask: Array,
    tasks: str | Sequence[str | None] | None,
    *,
    is_decoder: bool,
    rows: Sequence[int] | None = None,
) -> dict[str, Array]:
    """Check the outputs of whole sequences at the positions of tokens; padding may hold anything.

    Args:
        outputs: ``logits`` with shape ``(batch, seq, vocab)``, ``last_hidden_state`` with shape ``(batch, seq, d)``.
        mask: 1 for tokens of the input, shape ``(batch, seq)``.
        tasks: the request's.
        is_decoder: whether the logits are at the positions of ``mask``; else they are at a decoder's, all tokens.
        rows: places of these rows in the request; by default they are all of it.

    Returns:
        The outputs.

    Raises:
        BackendError: a value is not a number, or all of a position are equal.
    """
    for name, values in outputs.items():
        is_logits = name == "logits"
        worst, is_equal = _extremes(values, is_logits)
        is_bad = ~np.isfinite(worst) | is_equal
        if is_decoder or not is_logits:
            is_bad &= mask != 0
        if is_bad.any():
            row, position = (int(index) for index in np.argwhere(is_bad)[0])
            value, where = float(worst[row, position]), f"at position {position}"
            label = row_label(row if rows is None else rows[row], tasks)
            what = "logits" if is_logits else "hidden states"
            fault = all_equal if math.isfinite(value) else not_numbers
            raise fault(what, value, label, where)
    return outputs


def _extremes(values: Array, is_logits: bool) -> tuple[Array, Array]:
    """The value of each position that tells most, NaN before infinities, and whether all its values are equal.

    Args:
        values: shape ``(batch, seq, width)``.
        is_logits: whether minus infinity is a number. Equal logits are then looked for only where the first is largest.
    """
    with np.errstate(invalid="ignore"):  # a reduction with NaN in it may warn
        worst: Array = values.max(axis=-1)
        is_equal = (values[..., 0] == worst) & (values.shape[-1] > 1)
        if is_logits:
            if is_equal.any():
                is_equal[is_equal] = values[is_equal].min(axis=-1) == worst[is_equal]
            return worst, is_equal
        least = values.min(axis=-1)
        return np.where(np.isneginf(least), least, worst), is_equal & (least == worst)
