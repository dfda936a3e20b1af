"""A text task as a LoRA of the input embedding: ``x + scaling * B @ A[:, id]``.

On text an adapter is a function of the token alone, so its bottleneck can be computed for every token ahead: column
``id`` of ``A`` is ``act(down(x))`` of that token, and ``B`` is ``up``. A bias of ``up`` is one more column of ``B``,
with ones in ``A``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from adalink.export.adapter.check import activate, adapt_with_bound
from adalink.export.adapter.error_bound import UNDERFLOW, UNIT_ROUNDOFF, Float64
from adalink.export.lora.reading import StoredLora
from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.adapter import TABLE_NAME, Adapter

# Far more than the roundoffs of sums as long as a rank, and far less than one of float32.
_FLOAT64_NOISE = 2.0**-44

Float32 = npt.NDArray[np.float32]


class LoraFactors:
    """The two factors of a task.

    Attributes:
        second: ``B``, float32 ``(d, rank)``.
        alpha: PEFT's ``lora_alpha``: the scaling is ``alpha / rank``. It takes back the factor by which the model
            multiplies embeddings, since hosts add a LoRA before that.
    """

    def __init__(self, adapter: Adapter, scale: float) -> None:
        """Take the factors of a checked adapter (``check_lora``); ``scale`` is the factor of the model's embeddings."""
        weights = adapter.weights
        self._adapter = adapter
        bias = weights.get("text.up.bias")
        self._has_bias = bias is not None and bool(bias.any())
        self.second: Float32 = weights["text.up.weight"]
        if bias is not None and self._has_bias:
            self.second = np.concatenate([self.second, bias[:, None]], axis=1)
        self.alpha = self.rank / scale

    @property
    def rank(self) -> int:
        """Width of the LoRA: the adapter's rank, and one for a bias of ``up``."""
        return int(self.second.shape[1])

    def first(self, embeds: Float64, first: int) -> Float64:
        """Rows of ``A`` transposed, before they are rounded.

        Args:
            embeds: embeddings of consecutive tokens with shape ``(tokens, d)``, as the model's module returns them.
            first: id of the first token.

        Returns:
            Shape ``(tokens, rank)``.
        """
        weights, config = self._adapter.weights, self._adapter.config
        if config.input == "ids":
            hidden = weights[TABLE_NAME][first : first + len(embeds)].astype(np.float64)
        else:
            bias = weights.get("text.down.bias")
            hidden = embeds @ weights["text.down.weight"].T.astype(np.float64) + (0.0 if bias is None else bias)
        hidden = activate(config.activation, hidden)
        return np.concatenate([hidden, np.ones((len(hidden), 1))], axis=1) if self._has_bias else hidden

    def worst_ratio(self, embeds: Float64, first: int, stored: StoredLora, scale: float, dtype: str) -> float:
        """How far the embeddings that a file means are from the task's, at worst, in units of the bound.

        The bound is what rounding the file's numbers may change, so that the ratio of a right file is at most 1. What a
        host rounds when it computes is not in it.

        Args:
            embeds: as for ``first``.
            first: likewise.
            stored: what a file holds.
            scale: the factor of the model's embeddings.
            dtype: dtype of the file's numbers.
        """
        hidden = stored.first[first : first + len(embeds)].astype(np.float64)
        second, scaling = stored.second.astype(np.float64), stored.scaling * scale
        expected, _ = adapt_with_bound(self._adapter, "text", embeds, "float32", np.arange(first, first + len(embeds)))
        unit, tiny = UNIT_ROUNDOFF[dtype], UNDERFLOW[dtype]
        # Both factors and the scaling are rounded, to the dtype's digits, or near zero to its smallest step.
        roundings = (1 - unit) ** -3 - 1
        absolute, others = np.abs(hidden), np.abs(second)
        magnitude = absolute @ others.T
        lost = tiny * (absolute.sum(axis=1)[:, None] + others.sum(axis=1) + self.rank * tiny)
        # What float64 itself rounds here, on either side.
        noise = _FLOAT64_NOISE * (np.abs(embeds) + abs(scaling) * magnitude)
        bound = abs(scaling) * (roundings * magnitude + lost) + noise
        ratio = np.abs(embeds + hidden @ second.T * scaling - expected) / bound
        return float(np.nan_to_num(ratio, nan=np.inf).max())


def check_lora(adapter: Adapter, kind: str, origin: str) -> None:
    """Check that an adapter is a LoRA of the input embedding.

    Args:
        adapter: the adapter.
        kind: kind of the base.
        origin: what to call the adapter in errors.

    Raises:
        ConfigError: a part of it acts elsewhere; the message says which, and what to do.
    """
    config = adapter.config
    repair = "run it with the kit's own runtime, or train a task without it"
    reasons = {
        "its base is an encoder-decoder, whose decoder has the same embeddings": kind == "encoder-decoder",
        "its head acts on hidden states, behind the model": config.head is not None,
        "its soft prompt is no token, and a LoRA changes embeddings of tokens": config.soft_tokens > 0,
        "its KV prefix stands in the cache, and a LoRA changes embeddings of tokens": config.kv_prefix is not None,
        f"it adapts {', '.join(config.modalities)}, and a LoRA changes text alone": config.modalities != ("text",),
        'its scope is "prompt", and a LoRA changes generated tokens too': config.scope == "prompt",
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise ConfigError(f"{origin} cannot be exported as a LoRA: {reason}; {repair}")
