"""How cost grows: the curves, the slope fitted to each on log-log axes, and the one expected, with the reason.

A slope of 0 is a cost that does not grow, of 1 one in proportion. Where fixed and growing parts mix, the expected slope
is that of a cost model over the same points: bytes a step must read at the measured bandwidth, or arithmetic at the
measured rate, whichever takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from adalink.runtime.storage.manifest import Manifest


@dataclass(frozen=True)
class Model:
    """What the cost model needs to know of the base and the machine.

    Attributes:
        weight_bytes: weights that a decode step reads.
        cache_bytes: KV cache a position.
        parameters: multiplications a token, without those of attention.
        attention: multiplications of one token with one earlier position.
        bandwidth: bytes/s.
        rate: multiplications/s, of the prefill that was measured.
    """

    weight_bytes: float
    cache_bytes: float
    parameters: float
    attention: float
    bandwidth: float
    rate: float

    def step_s(self, rows: float, length: float) -> float:
        """Seconds of a decode step for ``rows`` rows with ``length`` earlier positions each."""
        read = (self.weight_bytes + rows * length * self.cache_bytes) / self.bandwidth
        return max(read, rows * (self.parameters + length * self.attention) / self.rate)

    def prefill_s(self, rows: float, length: float) -> float:
        """Seconds for ``rows`` prompts of ``length`` tokens; each token attends to half of them on average."""
        work = rows * length * (self.parameters + length / 2 * self.attention)
        return max(self.weight_bytes / self.bandwidth, work / self.rate)


@dataclass(frozen=True)
class Law:
    """What is expected of one curve.

    Attributes:
        expected: the slope, or a cost model of ``x``.
        because: the reason.
        start: the smallest ``x`` that it holds for; below it fixed costs hide the growth.
    """

    expected: float | Callable[[Model, float], float]
    because: str
    start: float = 0


def cost_model(manifest: Manifest, tokens: int, prefill_s: float, gb_s: float) -> Model:
    """The cost model of a deployment's base.

    Args:
        manifest: its manifest.
        tokens: length of a prompt.
        prefill_s: measured time to its first token.
        gb_s: measured memory bandwidth.
    """
    base = manifest.base
    variant = next(variant for variant in manifest.variants.values() if variant.quantization is None)
    weights = sum(manifest.files[path].size_bytes for path in variant.files if path.endswith(".data"))
    assert base.cache is not None
    parameters = weights / 4
    return Model(
        weight_bytes=weights,
        cache_bytes=2 * base.cache.layers * base.cache.kv_heads * base.cache.head_dim * 4,
        parameters=parameters,
        attention=2 * base.cache.layers * base.hidden_size,
        bandwidth=gb_s * 1e9,
        rate=parameters * tokens / prefill_s,
    )


BATCH_PROMPT, STEP_PROMPT = 16, 128

LAWS: dict[str, dict[str, Law]] = {
    "tasks": {
        "prefill_ms": Law(0, "the engine does not know how many tasks there are"),
        "decode_ms": Law(0, "the engine does not know how many tasks there are"),
        "swap_us": Law(0, "switching tasks is a look-up by name"),
        "memory_bytes": Law(1, "each task holds its own weights once"),
    },
    "rank": {
        "prefill_ms": Law(0, "even rank 512 adds less than half a percent to the base's arithmetic"),
        "decode_ms": Law(0, "even rank 512 adds less than half a percent to what a step reads"),
        "swap_us": Law(1, "one token's adaptation reads the weights, 2 r d numbers", start=128),
        "memory_bytes": Law(1, "weights of 2 r d numbers", start=16),
    },
    "sequence": {
        "prefill_ms": Law(lambda m, x: m.prefill_s(1, x), "cost model: arithmetic for every token, and attention"),
        "decode_ms": Law(lambda m, x: m.step_s(1, x), "cost model: weights and cache are read each step"),
        "swap_us": Law(1, "every token is looked up and adapted", start=16),
        "memory_bytes": Law(1, "cache and activations of every position, beyond what a short request left", start=256),
    },
    "batch": {
        "prefill_ms": Law(lambda m, x: m.prefill_s(x, BATCH_PROMPT), "cost model: arithmetic for every row"),
        "decode_ms": Law(lambda m, x: m.step_s(x, BATCH_PROMPT), "cost model: weights are read once for all rows"),
        "swap_us": Law(1, "every row brings a task of its own", start=4),
        "memory_bytes": Law(1, "cache and activations of every row, beyond what a short request left", start=8),
    },
}


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of the least-squares line through ``log y`` over ``log x``.

    Raises:
        ValueError: fewer than two different ``x``, or a value that is not positive.
    """
    if len(set(xs)) < 2 or len(xs) != len(ys):
        raise ValueError(f"a slope needs two points or more, got x {list(xs)} and y {list(ys)}")
    if min(*xs, *ys) <= 0:
        raise ValueError(f"a log-log slope needs positive values, got x {list(xs)} and y {list(ys)}")
    logs, values = [math.log(x) for x in xs], [math.log(y) for y in ys]
    middle, mean = sum(logs) / len(logs), sum(values) / len(values)
    return sum((x - middle) * (y - mean) for x, y in zip(logs, values, strict=True)) / sum(
        (x - middle) ** 2 for x in logs
    )


def fit(series: str, points: Mapping[float, Mapping[str, float]], model: Model) -> dict[str, dict[str, object]]:
    """Fitted and expected slope of every curve of a series; ``None`` where too few points are left.

    Args:
        series: a key of ``LAWS``.
        points: the measured figures at each ``x``.
        model: for the laws that are cost models.
    """
    fits: dict[str, dict[str, object]] = {}
    for name, law in LAWS[series].items():
        chosen = [x for x in sorted(points) if x >= law.start and points[x][name] > 0]
        fitted = expected = None
        if len(chosen) >= 2:
            fitted = slope(chosen, [points[x][name] for x in chosen])
            if callable(law.expected):
                expected = slope(chosen, [law.expected(model, x) for x in chosen])
            else:
                expected = float(law.expected)
        fits[name] = {"fitted": fitted, "expected": expected, "from": law.start, "because": law.because}
    return fits
