"""Activations of the traced example: a model that overflows inside is refused before its graph is written.

The example runs layer by layer: stand-ins get their values for as long as their layer is computed. A norm hides an
overflow: it divides by infinity, and finite numbers are left that no longer depend on the input. So the layers are
looked at, not only the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import ModelError

if TYPE_CHECKING:
    import torch

    from adalink.export.tracing.graph import TracedGraph
    from adalink.training.models.stand_ins import StandIns

# The square of a larger number is no float32, and norms square.
_LARGEST = 1e19


def check_activations(graph: TracedGraph, name: str, dtype: str) -> None:
    """Run the traced example once in PyTorch and look at what every layer gives.

    In float16 nothing is checked: T5 and others exceed its range and clamp.

    Args:
        graph: the graph to be traced, with attention in standard operators.
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

    with ExitStack() as stack, torch.no_grad():
        for layer, module in graph.module.named_modules():
            hook = module.register_forward_hook(lambda module, args, output, layer=layer: look(layer, output))
            stack.callback(hook.remove)
        stack.enter_context(_filled_layers(graph.module, graph.stand_ins))
        graph.module(*graph.inputs.values())
    if faults:
        raise ModelError(
            f"{name} does not compute numbers: {faults[0]} for a seeded example, expected less than {_LARGEST:g}; its "
            "weights are damaged or too large: export an intact checkpoint"
        )


@contextmanager
def _filled_layers(module: torch.nn.Module, stand_ins: StandIns) -> Iterator[None]:
    """Give stand-ins their values while their layer is called: the whole of a layer, or a module outside of layers."""
    import torch

    layers = [layer for part in module.modules() if isinstance(part, torch.nn.ModuleList) for layer in part.children()]
    inside = {inner for layer in layers for inner in layer.modules()}
    owned = {layer: list(layer.parameters()) for layer in layers}
    owned |= {part: list(part.parameters(recurse=False)) for part in module.modules() if part not in inside}
    values: dict[torch.nn.Module, ExitStack] = {}

    def enter(part: torch.nn.Module, _: Any) -> None:
        values[part] = ExitStack()
        values[part].enter_context(stand_ins.filled(owned[part]))

    def leave(part: torch.nn.Module, *_: Any) -> None:
        values.pop(part).close()

    with ExitStack() as stack:
        for part, parameters in owned.items():
            if any(parameter in stand_ins for parameter in parameters):
                stack.callback(part.register_forward_pre_hook(enter).remove)
                stack.callback(part.register_forward_hook(leave).remove)
        yield
