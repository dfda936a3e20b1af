"""Request validation: arguments are checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from adalink.runtime.arrays import Array
from adalink.runtime.errors import RequestError
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.safetensors import STORED

Tasks = str | Sequence[str | None] | None
# The texts, or the token ids of each.
Prompts = Sequence[str | Sequence[int]] | Array

_FEW = 64
_BF16_EXPONENT = np.uint16(0x7F80)


def check_input_ids(input_ids: npt.ArrayLike, base: Base, name: str = "input_ids") -> Array:
    """Token ids as int64 with shape ``(batch, seq)``; raises ``RequestError``."""
    ids = _as_array(input_ids, name)
    if ids.dtype.kind not in "iu":
        raise RequestError(f"{name} has dtype {ids.dtype}, expected whole numbers such as int64")
    if ids.ndim != 2 or 0 in ids.shape:
        raise RequestError(f"{name} has shape {ids.shape}, expected (batch, seq), each at least 1")
    low, high = _extremes(ids)
    if low < 0 or high >= base.vocab_size:
        bad = low if low < 0 else high
        raise RequestError(
            f"{name} holds {bad}, expected 0 to {base.vocab_size - 1}: it was made with another model's tokenizer"
        )
    return ids.astype(np.int64, copy=False)


def check_embeds(inputs_embeds: npt.ArrayLike, base: Base) -> Array:
    """Embeddings with shape ``(batch, seq, d)`` in the base's dtype; raises ``RequestError``."""
    embeds = _as_array(inputs_embeds, "inputs_embeds")
    if embeds.dtype != np.dtype(STORED[base.embedding_dtype]):
        how = "pass its bits as uint16" if base.embedding_dtype == "bfloat16" else "convert it"
        raise RequestError(f"inputs_embeds has dtype {embeds.dtype}, the base takes {base.embedding_dtype}: {how}")
    if embeds.ndim != 3 or embeds.shape[2] != base.hidden_size or 0 in embeds.shape:
        raise RequestError(f"inputs_embeds has shape {embeds.shape}, expected (batch, seq, {base.hidden_size})")
    is_finite = ((embeds & _BF16_EXPONENT) != _BF16_EXPONENT) if embeds.dtype == np.uint16 else np.isfinite(embeds)
    if not is_finite.all():
        raise RequestError("inputs_embeds holds NaN or infinity: check the encoder that made it")
    return embeds


def check_mask(attention_mask: npt.ArrayLike | None, shape: tuple[int, int]) -> Array:
    """Mask as int64 of ``shape``, all ones for ``None``; every row has a 1; raises ``RequestError``."""
    if attention_mask is None:
        return np.ones(shape, np.int64)
    mask = _as_array(attention_mask, "attention_mask")
    if mask.dtype.kind not in "iub":
        raise RequestError(f"attention_mask has dtype {mask.dtype}, expected int64 or bool")
    if mask.shape != shape:
        raise RequestError(f"attention_mask has shape {mask.shape}, expected {shape}, that of the input")
    if not np.isin(mask, (0, 1)).all():
        raise RequestError("attention_mask holds values other than 0 (padding) and 1 (token)")
    if not mask.any(axis=1).all():
        row = int(np.flatnonzero(~mask.any(axis=1))[0])
        raise RequestError(f"attention_mask: row {row} is all padding; give it a token or leave it out")
    return mask.astype(np.int64, copy=False)


def check_modality(modality: npt.ArrayLike | None, shape: tuple[int, int], base: Base) -> Array | None:
    """Modality of each position as int64 of ``shape``: an index in ``base.modalities``, -1 for none."""
    if modality is None:
        return None
    indices = _as_array(modality, "modality")
    if indices.dtype.kind not in "iu" or indices.shape != shape:
        raise RequestError(f"modality is {indices.dtype} with shape {indices.shape}, expected int64 with shape {shape}")
    if indices.min() < -1 or indices.max() >= len(base.modalities):
        raise RequestError(
            f"modality holds {indices.min()} to {indices.max()}, expected -1 (none) or an index in {base.modalities}"
        )
    return indices.astype(np.int64, copy=False)


def check_token_types(token_type_ids: npt.ArrayLike | None, shape: tuple[int, int], base: Base) -> Array | None:
    """Token types as int64 of ``shape``; ``None`` if none were given; raises ``RequestError``."""
    if token_type_ids is None:
        return None
    types = _as_array(token_type_ids, "token_type_ids")
    if types.dtype.kind not in "iu" or types.shape != shape:
        raise RequestError(
            f"token_type_ids is {types.dtype} with shape {types.shape}, expected int64 with shape {shape}"
        )
    if base.token_types is None and types.any():
        raise RequestError(
            f"token_type_ids holds {types.max()}, but this deployment of {base.name} was written by a kit without "
            "token types, and its graphs take every token for the first text's: export the base again, into another "
            "folder"
        )
    if types.min() < 0 or types.max() >= (base.token_types or 1):
        raise RequestError(
            f"token_type_ids holds {types.min()} to {types.max()}, expected 0 to {(base.token_types or 1) - 1}: "
            f"{base.name} tells no more segments apart"
        )
    return types.astype(np.int64, copy=False) if base.takes_token_types else None


def check_length(length: int, base: Base) -> None:
    """Check a sequence against the model's limit; raises ``RequestError``."""
    if base.max_positions is not None and length > base.max_positions:
        raise RequestError(
            f"the sequence would have {length} positions, {base.name} was made for at most {base.max_positions}: "
            "shorten the prompt or ask for fewer new tokens"
        )


def is_number(value: Any) -> bool:
    """Whether a setting is a number, of Python or of numpy."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_prompts(prompts: Prompts | None, base: Base, what: str = "prompt") -> list[str | list[int]]:
    """The prompts of a batch, or other texts, each a text or token ids; raises ``RequestError``."""
    items = prompts.tolist() if isinstance(prompts, np.ndarray) else prompts
    if isinstance(items, (str, bytes)) or not isinstance(items, Sequence) or not items:
        raise RequestError(f"{what}s is {items!r:.80}, expected a list with at least one text or list of token ids")
    checked: list[str | list[int]] = []
    for row, prompt in enumerate(items):
        name = f"{what} {row}"
        if isinstance(prompt, str):
            checked.append(check_text(prompt, name))
            continue
        ids = _as_array(prompt, name)
        if ids.ndim != 1:
            raise RequestError(
                f"{name} is {prompt!r:.80}, expected a text or a list of token ids: [[5, 6, 7]] is one {what} of three"
            )
        checked.append(check_input_ids(ids[None], base, name)[0].tolist() if ids.size else [])
    return checked


def check_text(text: str, name: str = "the text") -> str:
    """A text that UTF-8 can hold, as tokenizers need it; raises ``RequestError``."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} holds {text[error.start]!r} at character {error.start}, half of a character or a byte that was "
            "not UTF-8: decode it anew, as what it was written in"
        ) from error
    return text


def _extremes(ids: Array) -> tuple[int, int]:
    """Smallest and largest id. For few ids, as in every decode step, Python is faster than two reductions."""
    if ids.size <= _FEW:
        values = ids.ravel().tolist()
        return min(values), max(values)
    return int(ids.min()), int(ids.max())


def _as_array(value: npt.ArrayLike, name: str) -> Array:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise RequestError(f"{name} is not a rectangular array: pad the rows to one length ({error})") from error
