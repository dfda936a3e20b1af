"""Rounding error bound of the adapter: float32 ``x + up(act(down(x)))`` against the exact result.

The bounds are componentwise forward error bounds after Higham, Accuracy and Stability of Numerical Algorithms (2nd ed.,
2002), chapter 3: a sum of ``n`` terms, in any order, with or without fused multiply-add, has an error of at most
``gamma_n`` times the sum of the terms' absolute values. All arithmetic here is float64. See docs/concepts/parity.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

# Unit roundoff u of each dtype, its largest number, and the size below which a result may be flushed to zero or lose
# digits.
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
LARGEST = {"float32": 2.0**128 - 2.0**104, "float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120}
UNDERFLOW = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}


@dataclass(frozen=True)
class ActivationError:
    """What an activation does to errors.

    Attributes:
        lipschitz: largest slope, rounded up: an error in its argument grows by at most this factor.
        roundoffs: its own error in units of ``u * |argument|`` (``u * min(1, |argument|)`` for tanh, which is bounded).
    """

    lipschitz: float
    roundoffs: float


# Slopes: gelu' and its tanh form peak at 1.12890 and 1.12899, silu' at 1.09984. Own errors: docs/concepts/parity.md.
ACTIVATION_ERRORS = {
    "identity": ActivationError(1.0, 0.0),
    "relu": ActivationError(1.0, 0.0),
    "gelu": ActivationError(1.13, 8.0),
    "gelu_tanh": ActivationError(1.13, 8.0),
    "silu": ActivationError(1.1, 8.0),
    "tanh": ActivationError(1.0, 8.0),
}


def worst_ratio(received: npt.ArrayLike, exact: npt.ArrayLike, bound: npt.ArrayLike) -> float:
    """Largest deviation in units of its bound, over arrays of one shape; NaN counts as infinite."""
    deviation = np.abs(np.asarray(received, np.float64) - np.asarray(exact, np.float64))
    return float(np.nan_to_num(deviation / np.asarray(bound, np.float64), nan=np.inf).max())


def gamma(terms: npt.ArrayLike, unit_roundoff: float = UNIT_ROUNDOFF["float32"]) -> Float64:
    """``n u / (1 - n u)``, the relative error of a sum of ``n`` terms; ``terms`` of any shape."""
    product = np.asarray(terms, np.float64) * unit_roundoff
    if (product >= 1).any():
        raise ValueError(f"a sum of {np.max(terms)} terms has no bound at unit roundoff {unit_roundoff}")
    return np.asarray(product / (1 - product))


def adapter_bound(
    x: Float64,
    down: Float64,
    up: Float64,
    down_bias: Float64 | None,
    up_bias: Float64 | None,
    hidden: Float64,
    activated: Float64,
    *,
    activation: str,
    dtype: str,
) -> Float64:
    """Largest deviation of a correct task graph from the exact result, for every component.

    Args:
        x: inputs with shape ``(tokens, d)``, exact in ``dtype``.
        down: weight with shape ``(r, d)``.
        up: weight with shape ``(d, r)``.
        down_bias: shape ``(r,)`` or ``None``.
        up_bias: shape ``(d,)`` or ``None``.
        hidden: exact ``down(x)`` with shape ``(tokens, r)``.
        activated: exact ``act(hidden)`` with shape ``(tokens, r)``.
        activation: name of the activation.
        dtype: dtype of the graph's input and output; between them it computes in float32.

    Returns:
        Bounds with shape ``(tokens, d)``.
    """
    unit, tiny = UNIT_ROUNDOFF["float32"], UNDERFLOW["float32"]
    rank = up.shape[1]

    # Inner product. Products with an exact zero add no error, so only the others count as terms.
    terms = np.count_nonzero(x, axis=1, keepdims=True) + 1
    magnitude = np.abs(x) @ np.abs(down).T + _absolute(down_bias)
    hidden_error = gamma(terms) * magnitude + terms * tiny

    # Activation: the argument's error times the slope, and the activation's own error.
    error = ACTIVATION_ERRORS[activation]
    argument = np.abs(hidden) + hidden_error
    roundoff_scale = np.minimum(1.0, argument) if activation == "tanh" else argument
    activated_error = error.lipschitz * hidden_error + error.roundoffs * unit * roundoff_scale + tiny

    # Outer product and its bias.
    magnitude = (np.abs(activated) + activated_error) @ np.abs(up).T + _absolute(up_bias)
    delta_error = activated_error @ np.abs(up).T + gamma(rank + 1) * magnitude + (rank + 1) * tiny

    # The residual addition, and the rounding to the output's dtype.
    delta = activated @ up.T + (0.0 if up_bias is None else up_bias)
    result = np.abs(x + delta)
    result_error = delta_error + unit * (result + delta_error) + tiny
    if dtype != "float32":
        result_error = result_error + UNIT_ROUNDOFF[dtype] * (result + result_error) + UNDERFLOW[dtype]
    return np.asarray(result_error)


def _absolute(bias: Float64 | None) -> Float64 | float:
    return 0.0 if bias is None else np.abs(bias)
