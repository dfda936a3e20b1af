"""Merged linear layers: layers with the same input, such as queries, keys and values, as one product.

A decode step reads each weight once, so the rest of its cost is per node, and fewer, larger products are faster. One
run of the model shows which layers share their input, so no model family needs to be listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from adalink.training.models.stand_ins import StandIns
from adalink.training.models.weights import JoinedWeight

Linear = torch.nn.Linear


class MergedLinear(torch.nn.Module):
    """Several linear layers with one input as one product; each layer then returns its part.

    Attributes:
        layers: the layers, in call order.
        output: the product's last output, shape ``(..., sum of the widths)``: the layers' outputs side by side.
        is_random: whether to draw the output instead, to see what becomes of it; stand-ins give zeros.
    """

    layers: list[Linear]
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layers: list[Linear], stand_ins: StandIns | None = None) -> None:
        """``stand_ins``: what the layers' weights stand for."""
        super().__init__()
        known = stand_ins or StandIns()
        # Not as submodules: the layers' weights are not this product's. Its weights are buffers, which the exporter
        # writes as initializers; constants would be in the graph's own bytes.
        self.__dict__["layers"] = layers
        self.output: torch.Tensor | None = None
        joined = JoinedWeight([known.source(layer.weight) for layer in layers])
        is_stand_in = layers[0].weight in known
        dtype = layers[0].weight.dtype
        self.register_buffer("weight", known.make(joined, dtype) if is_stand_in else joined.read().to(dtype))
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.register_buffer("bias", torch.cat(biases) if biases else None)
        self.is_random = False
        self._waiting: list[torch.Tensor] = []

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the next layer; the first call of a round computes all."""
        if not self._waiting:
            if self.is_random:
                self.output = torch.randn(*x.shape[:-1], len(self.weight)).to(x.dtype)
            else:
                self.output = torch.nn.functional.linear(x, self.weight, self.bias)
            self._waiting = list(torch.split(self.output, [layer.out_features for layer in self.layers], dim=-1))
        return self._waiting.pop(0)


def find_groups(model: torch.nn.Module, run: Callable[[], Any]) -> list[list[Linear]]:
    """Groups of linear layers of one parent that get the same tensor, in call order.

    Args:
        model: the model.
        run: calls it once.
    """
    parents = {id(child): id(module) for module in model.modules() for child in module.children()}
    by_input: dict[tuple[int, int], list[Linear]] = {}
    inputs: list[torch.Tensor] = []  # kept, so that no id is reused

    def record(layer: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0])
        assert isinstance(layer, Linear)
        by_input.setdefault((parents[id(layer)], id(arguments[0])), []).append(layer)

    with ExitStack() as stack:
        for layer in model.modules():
            if type(layer) is Linear:
                stack.callback(layer.register_forward_pre_hook(record).remove)
        run()
    return [g for g in by_input.values() if len(g) > 1 and len({layer.bias is None for layer in g}) == 1]


@contextmanager
def merged(products: Sequence[MergedLinear]) -> Iterator[None]:
    """Let the layers of each product return their part of it until the block ends."""
    layers = [(layer, product) for product in products for layer in product.layers]
    for layer, product in layers:
        layer.__dict__["forward"] = product.part
    try:
        yield
    finally:
        for layer, _ in layers:
            del layer.__dict__["forward"]
