"""Rounded inputs of quantised products, in PyTorch: what an engine does to activations that it multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class RoundedProduct(Protocol):
    """A linear layer whose inputs its engine rounds."""

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Its inputs, rounded."""
        ...


@contextmanager
def rounded_inputs(layer: RoundedProduct, module: Any) -> Iterator[None]:
    """Round the inputs of ``module``, the layer in either precision, until the block ends."""
    handle = module.register_forward_pre_hook(
        lambda _, arguments: (layer.rounded(arguments[0]), *arguments[1:]),
    )
    try:
        yield
    finally:
        handle.remove()


def rounded_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """Numbers in blocks of ``size`` along the last axis, rounded to 8 bits.

    The step of a block is its largest magnitude over 127, as in ONNX Runtime's operator at ``accuracy_level`` 4
    (``sqnbitgemm``) and in llama.cpp's Q8_0 and Q8_K. The implementation is independent of them.
    """
    import torch

    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    blocks = padded.reshape(*x.shape[:-1], -1, size)
    step = blocks.abs().amax(dim=-1, keepdim=True) / 127
    near = torch.where(step > 0, torch.round(blocks / step) * step, blocks)
    return near.flatten(-2)[..., : x.shape[-1]]
