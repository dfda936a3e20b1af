"""The derived bound never fires on a correct float32 evaluation, in any order, and always on a changed weight."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adalink.export.adapter.error_bound import ACTIVATION_ERRORS, adapter_bound, gamma
from adalink.runtime.storage.adapter import AdapterConfig, make_adapter
from adalink.runtime.storage.adapter_spec import ACTIVATIONS
from adalink.tools.parity.reference.float64_adapter import exact_adapter

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def random_adapter(rng, width, rank, activation, bias, scale=1.0):
    config = AdapterConfig(
        base_model_name_or_path="tiny",
        base_fingerprint="sha256:" + "0" * 64,
        hidden_size=width,
        rank=rank,
        activation=activation,
        bias=bias,
        modalities=("text",),
        scope="all",
    )
    shapes = {"down.weight": (rank, width), "up.weight": (width, rank)}
    if bias:
        shapes |= {"down.bias": (rank,), "up.bias": (width,)}
    weights = {f"text.{k}": (rng.normal(size=shape) * scale).astype(np.float32) for k, shape in shapes.items()}
    return make_adapter(config, weights)


def activate(name, h):
    functions = {
        "identity": lambda v: v,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
    }
    return functions[name](torch.from_numpy(h)).numpy()


def sequential(a, b):
    """a @ b.T in float32, one term after the other: the worst order there is."""
    total = np.zeros((a.shape[0], b.shape[0]), np.float32)
    for k in range(a.shape[1]):
        total = (total + (a[:, k : k + 1] * b[:, k]).astype(np.float32)).astype(np.float32)
    return total


def shuffled(a, b):
    order = np.random.default_rng(9).permutation(a.shape[1])
    return sequential(a[:, order], b[:, order])


ORDERS = {"blas": lambda a, b: a @ b.T, "sequential": sequential, "shuffled": shuffled}


def float32_adapter(adapter, x, order, dtype):
    """The method in float32, with the sums taken in the given order, rounded to ``dtype``."""
    w = adapter.weights
    h = ORDERS[order](x, w["text.down.weight"])
    if "text.down.bias" in w:
        h = h + w["text.down.bias"]
    s = ORDERS[order](activate(adapter.config.activation, h), w["text.up.weight"])
    if "text.up.bias" in w:
        s = s + w["text.up.bias"]
    return torch.from_numpy(x + s).to(TORCH_DTYPES[dtype]).double().numpy()


def sample_inputs(rng, tokens, width, magnitude, dtype):
    """Float32 inputs that are exact in ``dtype``."""
    values = torch.from_numpy(rng.normal(size=(tokens, width)) * magnitude)
    return values.to(TORCH_DTYPES[dtype]).float().numpy()


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(2, 96),
    rank=st.integers(1, 24),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    magnitude=st.sampled_from([1e-30, 1e-6, 1e-2, 1.0, 30.0]),
    scale=st.sampled_from([1e-4, 0.1, 1.0, 4.0]),
    order=st.sampled_from(sorted(ORDERS)),
    dtype=st.sampled_from(sorted(TORCH_DTYPES)),
)
def test_correct_evaluations_stay_within_the_bound(seed, width, rank, activation, bias, magnitude, scale, order, dtype):
    rng = np.random.default_rng(seed)
    rank = min(rank, width)
    adapter = random_adapter(rng, width, rank, activation, bias, scale)
    x = sample_inputs(rng, 40, width, magnitude, dtype)
    exact = exact_adapter(adapter, "text", x.astype(np.float64), dtype)
    computed = float32_adapter(adapter, x, order, dtype)
    finite = np.isfinite(computed)  # float16 may overflow, which is no rounding error
    assert (np.abs(computed - exact.output) <= exact.bound)[finite].all()


def test_the_bound_is_close_to_what_really_happens():
    """Not vacuous: random rounding errors come within two orders of magnitude of the worst case."""
    rng = np.random.default_rng(1)
    adapter = random_adapter(rng, 96, 8, "identity", bias=False)
    x = sample_inputs(rng, 4000, 96, 1.0, "float32")
    exact = exact_adapter(adapter, "text", x.astype(np.float64), "float32")
    ratio = np.abs(float32_adapter(adapter, x, "sequential", "float32") - exact.output) / exact.bound
    assert 1 / 100 < ratio.max() <= 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("part", ["down.weight", "up.weight"])
def test_one_percent_of_one_weight_is_found_in_a_vocabulary(activation, part):
    """Every single weight of the matrix, one after the other."""
    rng = np.random.default_rng(3)
    adapter = random_adapter(rng, 32, 4, activation, bias=True, scale=0.2)
    x = sample_inputs(rng, 400, 32, 1.0, "float32")
    exact = exact_adapter(adapter, "text", x.astype(np.float64), "float32")
    clean = adapter.weights[f"text.{part}"]
    missed = []
    for index in np.ndindex(clean.shape):
        changed = clean.copy()
        changed[index] *= np.float32(1.01)
        faulty = make_adapter(adapter.config, {**adapter.weights, f"text.{part}": changed})
        deviation = np.abs(float32_adapter(faulty, x, "blas", "float32") - exact.output)
        if not (deviation > exact.bound).any():
            missed.append((index, float(clean[index])))
    # A weight this close to zero changes nothing that float32 could show.
    assert all(abs(value) < 1e-4 for _, value in missed), missed


def test_a_modality_without_weights_must_pass_bit_exactly():
    rng = np.random.default_rng(2)
    adapter = random_adapter(rng, 16, 2, "gelu", bias=False)
    x = rng.normal(size=(5, 16))
    exact = exact_adapter(adapter, "image", x, "float32")
    np.testing.assert_array_equal(exact.output, x)
    assert not exact.bound.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_and_own_errors_cover_torch(activation):
    """The constants against autograd's slope and torch's float32 kernels."""
    error = ACTIVATION_ERRORS[activation]
    grid = torch.linspace(-20, 20, 400_001, dtype=torch.float64, requires_grad=True)
    functions = {
        "identity": lambda v: v * 1.0,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
    }
    (slope,) = torch.autograd.grad(functions[activation](grid).sum(), grid)
    assert float(slope.abs().max()) <= error.lipschitz
    points = grid.detach().float()
    deviation = (functions[activation](points).double() - functions[activation](points.double())).abs()
    scale = points.double().abs().clamp(max=1.0) if activation == "tanh" else points.double().abs()
    assert bool((deviation <= error.roundoffs * 2.0**-24 * scale).all())


def test_gamma():
    assert gamma(1000) == pytest.approx(1000 * 2.0**-24, rel=1e-4)
    with pytest.raises(ValueError, match="no bound"):
        gamma(2**24)


def test_bias_and_zero_inputs_are_counted():
    """x = 0: the bound is that of the biases alone, and not zero."""
    zeros = np.zeros((1, 4))
    up = np.ones((4, 2))
    bound = adapter_bound(
        zeros,
        np.ones((2, 4)),
        up,
        np.ones(2),
        np.ones(4),
        np.ones((1, 2)),
        np.ones((1, 2)),
        activation="identity",
        dtype="float32",
    )
    assert (bound > 0).all()
    assert bound.max() < 1e-5


@pytest.mark.parametrize("part", ["down.weight", "up.weight"])
def test_one_percent_of_one_weight_is_found_by_unit_vectors_at_real_width(part):
    """At d = 576 a vocabulary hides one weight behind the rounding of 575 others; unit vectors do not."""
    rng = np.random.default_rng(4)
    adapter = random_adapter(rng, 576, 16, "gelu", bias=False, scale=0.05)
    x = np.vstack([np.eye(576), -np.eye(576)]).astype(np.float32)
    exact = exact_adapter(adapter, "text", x.astype(np.float64), "float32")
    clean = adapter.weights[f"text.{part}"]
    for _ in range(20):
        index = tuple(rng.integers(0, size) for size in clean.shape)
        changed = clean.copy()
        changed[index] *= np.float32(1.01)
        faulty = make_adapter(adapter.config, {**adapter.weights, f"text.{part}": changed})
        deviation = np.abs(float32_adapter(faulty, x, "blas", "float32") - exact.output)
        assert (deviation > exact.bound).any(), (index, clean[index])
    assert (np.abs(float32_adapter(adapter, x, "blas", "float32") - exact.output) <= exact.bound).all()
