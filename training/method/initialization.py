"""Initialization of an adapter's ``down``: centered on the embeddings, or from gradients of training rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import nn

from adalink.runtime.errors import ModelError

if TYPE_CHECKING:
    from adalink.training.method.attach import AdaLinkModel

    RowT = TypeVar("RowT")

_TOKENS_AT_ONCE = 8192
_GRADIENT_ROWS = 64


@torch.no_grad()
def center_features(down: nn.Linear, embedding: nn.Module, vocab_size: int) -> None:
    """Make ``down`` orthogonal to the mean embedding, and scale it.

    The mean of a base's embeddings can be about as long as the deviations from it (SmolLM2: 2.2 and 2.3). Then each
    random feature is nearly the same for all tokens, and the first training steps move all tokens by one vector. After
    centering, the features of the vocabulary have mean 0 and overall root mean square 1 for any base. If all tokens
    are alike, ``down`` is unchanged.

    Args:
        down: ``d`` to ``r``; its weight with shape ``(r, d)`` is changed in place, its bias is not.
        embedding: the model's embedding module, without an adapter; its output is the adapter's input.
        vocab_size: size ``V`` of the vocabulary.
    """
    weight = down.weight.to(next(embedding.parameters()).device, torch.float64)
    mean = _mean(embedding, vocab_size)
    weight = _orthogonal(weight, mean)
    square = sum(float((block @ weight.T).square().sum()) for block in _embeddings(embedding, vocab_size))
    size = (square / (vocab_size * len(weight))) ** 0.5
    if size > 1e-6 * float(mean.norm()):
        down.weight.copy_(weight / size)


@torch.no_grad()
def _mean(embedding: nn.Module, vocab_size: int) -> torch.Tensor:
    """The mean embedding of the vocabulary, float64 with shape ``(d,)``."""
    return torch.stack([block.sum(0) for block in _embeddings(embedding, vocab_size)]).sum(0) / vocab_size


def _orthogonal(rows: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """The component of each row orthogonal to ``direction``."""
    unit = nn.functional.normalize(direction, dim=0)
    return rows - torch.outer(rows @ unit, unit)


def _embeddings(embedding: nn.Module, vocab_size: int) -> Iterator[torch.Tensor]:
    """float64 with shape ``(up to _TOKENS_AT_ONCE, d)``, all tokens in turn."""
    device = next(embedding.parameters()).device
    for start in range(0, vocab_size, _TOKENS_AT_ONCE):
        ids = torch.arange(start, min(start + _TOKENS_AT_ONCE, vocab_size), device=device)
        yield embedding(ids.unsqueeze(0))[0].double()


def measure_gradients(
    module: nn.Module,
    attached: AdaLinkModel,
    rows: Sequence[RowT],
    collate: Callable[[Sequence[RowT]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Gradient of the loss with respect to an unrestricted linear map ``M`` in ``x' = x + M x``, at ``M = 0``.

    For tokens only the part orthogonal to the vocabulary's mean counts, as in ``center_features``. Nothing changes,
    except that the module is in evaluation mode afterwards.

    Args:
        module: returns ``{"loss": ...}`` for a batch, through the adapters.
        attached: those adapters, newly made.
        rows: training rows; 64 of them are sampled.
        collate: makes a batch of rows.
        batch_size: rows per batch.
        seed: seed of the sample.

    Returns:
        float64 with shape ``(d, d)`` for each adapter, by modality; zero for one without a position in these rows.
    """
    module.eval()
    width, device = attached.hidden_size, attached.model.device
    maps = {name: torch.zeros(width, width, device=device, requires_grad=True) for name in attached.adapters}
    totals = {name: torch.zeros_like(wide, dtype=torch.float64) for name, wide in maps.items()}
    sample = random.Random(seed).sample(rows, min(_GRADIENT_ROWS, len(rows)))
    handles = [adapter.register_forward_hook(_with_map(maps[name])) for name, adapter in attached.adapters.items()]
    try:
        for start in range(0, len(sample), batch_size):
            batch = {name: value.to(device) for name, value in collate(sample[start : start + batch_size]).items()}
            gradients = torch.autograd.grad(module(**batch)["loss"], list(maps.values()), allow_unused=True)
            for name, gradient in zip(maps, gradients, strict=True):
                if gradient is not None:
                    totals[name] += gradient
    finally:
        for handle in handles:
            handle.remove()
    if "text" in totals:
        totals["text"] = _orthogonal(totals["text"], _mean(attached.embedding, attached.vocab_size))
    return {name: total.cpu() for name, total in totals.items()}


def find_directions(
    module: nn.Module,
    attached: AdaLinkModel,
    rows: Sequence[RowT],
    collate: Callable[[Sequence[RowT]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The directions of the embeddings with the steepest first step, strongest first.

    A bottleneck of width ``r`` has its steepest first step on the ``r`` strongest right singular vectors of the
    gradient. LoRA-GA (arXiv 2407.05000) initializes LoRA so. Arguments are those of ``measure_gradients``.

    Returns:
        All directions as rows, float64 with shape ``(d, d)``, for each adapter by modality; an adapter with a gradient
        of zero has none.

    Raises:
        ModelError: a gradient is not finite.
    """
    gradients = measure_gradients(module, attached, rows, collate, batch_size=batch_size, seed=seed)
    directions = {}
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            raise ModelError(
                f"the gradient at the embeddings ({name}) is not finite on the first rows, before any training: train "
                "with --init kaiming, and see that the base's weights are what they should be"
            )
        if gradient.any():
            vectors = torch.linalg.eigh(gradient.T @ gradient).eigenvectors  # in ascending order of eigenvalues
            directions[name] = vectors.flip(1).T
    return directions


@torch.no_grad()
def follow_directions(attached: AdaLinkModel, directions: Mapping[str, torch.Tensor]) -> None:
    """Make the first ``r`` directions the rows of each adapter's ``down``.

    Each row has the root mean square length of a row of the uniform initialization, ``sqrt(1 / 3)``. ``up`` stays zero;
    biases do not change.

    Args:
        attached: newly made adapters; one without directions keeps its ``down``.
        directions: directions from ``find_directions``.
    """
    for name, rows in directions.items():
        down = cast("nn.Linear", attached.adapters[name].down)
        down.weight.copy_(rows[: down.out_features] / 3**0.5)


def _with_map(wide: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
    """A forward hook that adds ``M x`` to an adapter's output."""

    def add(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        with torch.autocast(output.device.type, enabled=False):
            return output + (arguments[0].float() @ wide.T).to(output.dtype)

    return add
