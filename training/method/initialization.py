"""How an adapter's ``down`` starts: what a fresh bottleneck sees of the embeddings."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import nn

from adalink.runtime.errors import ModelError

if TYPE_CHECKING:
    from adalink.training.method.attach import AdaLinkModel

    Row = TypeVar("Row")

_TOKENS_AT_ONCE = 8192
_GRADIENT_ROWS = 64


@torch.no_grad()
def center_features(down: nn.Linear, embedding: nn.Module, vocab_size: int) -> None:
    """Turn ``down`` away from what all tokens share, and scale it.

    The mean of a base's embeddings can be about as long as what sets a token apart (SmolLM2: 2.2 and 2.3). Then each
    random feature is nearly the same for all tokens, and the first steps of training move all tokens by one vector.
    After this the features of the vocabulary have the mean 0 and, over all of them, the root mean square 1, whatever
    the base. Where all tokens are alike, ``down`` is left as it is.

    Args:
        down: ``d`` to ``r``; its weight with shape ``(r, d)`` is changed in place, its bias is not.
        embedding: the model's embedding module, without an adapter: what it gives for an id is what an adapter sees.
        vocab_size: how many tokens it knows, ``V``.
    """
    weight = down.weight.to(next(embedding.parameters()).device, torch.float64)
    mean = _mean(embedding, vocab_size)
    weight = _without(weight, mean)
    square = sum(float((block @ weight.T).square().sum()) for block in _embeddings(embedding, vocab_size))
    size = (square / (vocab_size * len(weight))) ** 0.5
    if size > 1e-6 * float(mean.norm()):
        down.weight.copy_(weight / size)


@torch.no_grad()
def _mean(embedding: nn.Module, vocab_size: int) -> torch.Tensor:
    """The mean embedding of the vocabulary, float64 with shape ``(d,)``."""
    return torch.stack([block.sum(0) for block in _embeddings(embedding, vocab_size)]).sum(0) / vocab_size


def _without(rows: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """What each row has across ``direction``."""
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
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The loss's gradient by a linear map ``M`` in ``x' = x + M x``, were there room for any, at ``M = 0``.

    Of tokens only what lies across the vocabulary's mean counts, as in ``center_features``. Nothing is changed, but
    that the module is in evaluation mode afterwards.

    Args:
        module: gives ``{"loss": ...}`` for a batch, with the adapters in its way.
        attached: those adapters, freshly made.
        rows: what is learned from; 64 of them are drawn.
        collate: makes a batch of rows.
        batch_size: rows at once.
        seed: seed of the draw.

    Returns:
        float64 with shape ``(d, d)`` for each adapter, by modality; zero for one that acts on nothing in these rows.
    """
    module.eval()
    width, device = attached.hidden_size, attached.model.device
    maps = {name: torch.zeros(width, width, device=device, requires_grad=True) for name in attached.adapters}
    totals = {name: torch.zeros_like(wide, dtype=torch.float64) for name, wide in maps.items()}
    drawn = random.Random(seed).sample(rows, min(_GRADIENT_ROWS, len(rows)))
    handles = [adapter.register_forward_hook(_with_map(maps[name])) for name, adapter in attached.adapters.items()]
    try:
        for start in range(0, len(drawn), batch_size):
            batch = {name: value.to(device) for name, value in collate(drawn[start : start + batch_size]).items()}
            found = torch.autograd.grad(module(**batch)["loss"], list(maps.values()), allow_unused=True)
            for name, gradient in zip(maps, found, strict=True):
                if gradient is not None:
                    totals[name] += gradient
    finally:
        for handle in handles:
            handle.remove()
    if "text" in totals:
        totals["text"] = _without(totals["text"], _mean(attached.embedding, attached.vocab_size))
    return {name: total.cpu() for name, total in totals.items()}


def find_directions(
    module: nn.Module,
    attached: AdaLinkModel,
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The directions of the embeddings that the task asks for first.

    The ``r`` strongest right singular vectors of the gradient by a map ``M`` are what a bottleneck of width ``r`` has
    to see of an embedding for the steepest first step of that rank (LoRA-GA, arXiv 2407.05000, starts LoRA so). The
    arguments are those of ``measure_gradients``.

    Returns:
        All of them, float64 with shape ``(d, d)``, a row each, the strongest first, for each adapter by modality; one
        with a gradient of zero has none.

    Raises:
        ModelError: a gradient is not finite.
    """
    gradients = measure_gradients(module, attached, rows, collate, batch_size=batch_size, seed=seed)
    found = {}
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            raise ModelError(
                f"the gradient at the embeddings ({name}) is not finite on the first rows, before any training: train "
                "with --init kaiming, and see that the base's weights are what they should be"
            )
        if gradient.any():
            vectors = torch.linalg.eigh(gradient.T @ gradient).eigenvectors  # of the largest eigenvalue last
            found[name] = vectors.flip(1).T
    return found


@torch.no_grad()
def follow_directions(attached: AdaLinkModel, directions: Mapping[str, torch.Tensor]) -> None:
    """Make the first ``r`` directions the rows of each adapter's ``down``.

    Each gets the length that a row of the uniform start has on average, ``sqrt(1 / 3)``. ``up`` stays zero, and biases
    as they are.

    Args:
        attached: freshly made adapters; one without directions keeps its ``down``.
        directions: of ``find_directions``.
    """
    for name, rows in directions.items():
        down = cast("nn.Linear", attached.adapters[name].down)
        down.weight.copy_(rows[: down.out_features] / 3**0.5)


def _with_map(wide: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
    """A forward hook that adds ``M x`` to what an adapter gives."""

    def add(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        with torch.autocast(output.device.type, enabled=False):
            return output + (arguments[0].float() @ wide.T).to(output.dtype)

    return add
