"""Activations of the traced example: a model that overflows inside is refused before its graph is written.

A norm hides an overflow: it divides by infinity, and finite numbers are left that no longer depend on the input. So
the layers are looked at, not only the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import ModelError

if TYPE_CHECKING:
    from adalink.export.tracing.graph import TracedGraph

# The square of a larger number is no float32, and norms square.
_LARGEST = 1e19


def check_activations(graph: TracedGraph, name: str, dtype: str) -> None:
    """Run the traced example once in PyTorch and look at what every layer gives.

    In float16 nothing is checked: T5 and others exceed its range and clamp.

    Args:
        graph: the graph to be traced.
        name: display name of the model.
        dtype: dtype of its weights.

    Raises:
        ModelError: a layer gives NaN, infinity or numbers beyond the range of its dtype.
    """
    import torch

    if dtype == "float16":
        return
    faults: list[str] = []

    def look(layer: str, output: Any) -> None:
        # What follows the states may be a mask, whose smallest number is meant.
        tensor = output[0] if isinstance(output, (tuple, list)) and output else output
        if not faults and isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
            largest = float(tensor.abs().max())  # NaN if one is NaN
            if not largest < _LARGEST:
                faults.append(f"{layer} gives {largest:.3g}")

    handles = [
        module.register_forward_hook(lambda module, args, output, layer=layer: look(layer, output))
        for layer, module in graph.module.named_modules()
    ]
    try:
        with torch.no_grad():
            graph.module(*graph.inputs.values())
    finally:
        for handle in handles:
            handle.remove()
    if faults:
        raise ModelError(
            f"{name} does not compute numbers: {faults[0]} for a seeded example, expected less than {_LARGEST:g}; its "
            "weights are damaged or too large: export an intact checkpoint"
        )
