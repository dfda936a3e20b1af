"""What the tests of attaching to models that take images share: adapters with weights, and the method by hand."""

from __future__ import annotations

import torch

from adalink.training.config import AdaLinkConfig

MODALITIES = [("text",), ("image",), ("text", "image"), ("image", "text")]


def config(modalities, **settings):
    return AdaLinkConfig(**({"rank": 4, "activation": "gelu", "bias": True, "modalities": modalities} | settings))


def disturb(attached, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def residual(adapter, x):
    inner = x @ adapter.down.weight.T + adapter.down.bias
    gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    return gelu @ adapter.up.weight.T + adapter.up.bias
