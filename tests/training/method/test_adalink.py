"""The method against plain float64 arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.adapter_spec import ACTIVATIONS
from adalink.training.method.adalink import AdaLink
from adalink.training.method.config import AdaLinkConfig

WIDTH, RANK = 24, 5

_erf = np.vectorize(math.erf)
REFERENCE = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: 0.5 * z * (1 + _erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "tanh": np.tanh,
}


def trained(activation: str = "gelu", bias: bool = True, dropout: float = 0.0) -> AdaLink:
    """An adapter with weights large enough to bend every activation."""
    module = AdaLink(WIDTH, RANK, activation, bias, dropout)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module


def by_hand(module: AdaLink, x: torch.Tensor, activation: str) -> np.ndarray:
    w = {name: value.detach().double().numpy() for name, value in module.state_dict().items()}
    wide = x.double().numpy()
    narrow = REFERENCE[activation](wide @ w["down.weight"].T + w.get("down.bias", 0.0))
    return wide + narrow @ w["up.weight"].T + w.get("up.bias", 0.0)


def embeddings(seed: int = 3) -> torch.Tensor:
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_computes_the_method(activation, bias):
    module, x = trained(activation, bias), embeddings()
    np.testing.assert_allclose(module(x).detach().numpy(), by_hand(module, x, activation), rtol=0, atol=3e-5)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "gelu"])
def test_activations_are_told_apart(activation):
    module, x = trained("gelu"), embeddings()
    assert np.abs(module(x).detach().numpy() - by_hand(module, x, activation)).max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_fresh_is_the_identity_bit_for_bit(bias, dtype):
    module, x = AdaLink(WIDTH, RANK, "gelu", bias), embeddings().to(dtype)
    assert torch.equal(module(x), x)
    assert module.down.weight.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_input_is_rounded_once(dtype):
    module, x = trained(), embeddings().to(dtype)
    result = module(x)
    assert result.dtype == dtype
    assert torch.equal(result, module(x.float()).to(dtype))


def test_autocast_does_not_lower_the_arithmetic():
    module, x = trained(), embeddings()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(x)
        lowered = module.up(module.down(x))
    assert torch.equal(inside, module(x))
    assert lowered.dtype == torch.bfloat16


def test_dropout_acts_in_training_only():
    module, x = trained(dropout=0.5), embeddings()
    torch.manual_seed(0)
    assert not torch.equal(module(x), module(x))
    module.eval()
    np.testing.assert_allclose(module(x).detach().numpy(), by_hand(module, x, "gelu"), rtol=0, atol=3e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, r"rank is 0, expected a whole number of at least 1"),
        ({"rank": -3}, r"rank is -3"),
        ({"activation": "swish"}, r"activation is 'swish', expected one of identity"),
        ({"scope": "target"}, r"scope is 'target'"),
        ({"modalities": ()}, r"modalities are \(\)"),
        ({"modalities": ("text", "text")}, r"none twice"),
        ({"dropout": 1.0}, r"dropout is 1.0, expected"),
        ({"dropout": float("nan")}, r"dropout is nan"),
    ],
)
def test_config_refuses(wrong, message):
    with pytest.raises(ConfigError, match=message):
        AdaLinkConfig(**wrong)


def test_down_starts_kaiming_uniform():
    """Uniform within ``1 / sqrt(d)``, as PyTorch's own linear layers: a wider start would be another method."""
    torch.manual_seed(2)
    weight = AdaLink(400, 50, bias=True).down.weight.detach()
    assert 0.99 / 20 < weight.abs().max() <= 1 / 20
    assert float(weight.std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    assert abs(float(weight.mean())) < 1e-3
