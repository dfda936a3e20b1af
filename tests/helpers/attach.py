"""What the tests of attaching to models that take images share: adapters with weights, and the method by hand."""

from __future__ import annotations

import torch

from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig

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


def check_adapted(model, inputs, modalities, by_hand, atol=1e-5):
    """Attach, compare with ``by_hand(model, adapters, inputs)``, detach; returns what was attached, and the logits."""
    plain = logits(model, **inputs)
    with attach(model, config(modalities)) as attached:
        assert torch.equal(logits(model, **inputs), plain), "a fresh adapter is the identity"
        disturb(attached)
        adapted = logits(model, **inputs)
    real = inputs["attention_mask"].bool()
    expected = by_hand(model, attached.adapters, inputs)
    torch.testing.assert_close(adapted[real], expected[real], rtol=0, atol=atol)
    assert (adapted - plain)[real].abs().max() > 0.05
    assert torch.equal(logits(model, **inputs), plain), "detaching leaves a trace"
    return attached, adapted


def check_untouched(model, inputs, modality, language_model, placeholder):
    """Adapt one modality; what the language model is fed at the positions of the other stays bit for bit."""
    seen = []
    handle = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    logits(model, **inputs)
    with attach(model, config((modality,))) as attached:
        disturb(attached)
        logits(model, **inputs)
    handle.remove()
    is_image = inputs["input_ids"] == placeholder
    other = ~is_image if modality == "image" else is_image
    plain, adapted = seen
    assert torch.equal(adapted[other], plain[other])
    assert (adapted[~other] != plain[~other]).any(dim=-1).all()
