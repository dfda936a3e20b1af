"""Limits on what a config makes: no more than the weight files can fill.

A config is a few lines that anybody can change. A million layers in it would be made one by one, for minutes, before
their weights are found missing. So counts are compared with the files first, and the numbers of a model are counted
while its modules are made.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import ModelError

if TYPE_CHECKING:
    import torch

# Counts that configs of transformers turn into lists, such as one kind of attention for each layer.
_COUNT = re.compile(r"(^|_)(layers?|blocks?|depths?|labels)$")
# So many of anything cost nothing. Some configs count what a model does not have.
_FREE_COUNT = 1000
# Where nothing says how many there are: lists that are made at once.
_LIST_LIMIT = 100_000
# Tables and heads that are tied later are made apart first: of T5 and its like, four of one size.
_MADE_FACTOR = 8
# Of numbers in memory. A pooler may be missing; of much more than the files hold, the rest would be random.
_FILLED_FACTOR = 2


def check_counts(config: Mapping[str, Any], tensors: int | None, name: str) -> None:
    """Check the counts of a config, and of its parts, before anything is made of it.

    Args:
        config: fields of ``config.json``.
        tensors: how many tensors the weight files hold; ``None`` where only the tokenizer is wanted.
        name: display name of the model, for errors.

    Raises:
        ModelError: it counts more layers than there are tensors.
    """
    limit = _LIST_LIMIT if tensors is None else max(tensors, _FREE_COUNT)
    for field, value in _fields(config):
        if isinstance(value, int) and _COUNT.search(field) and value > limit:
            held = "" if tensors is None else f", and the weight files hold {tensors} tensors"
            raise ModelError(
                f"base model {name}: config.json says {field} {value:.4g}{held}; expected at most {limit}: correct "
                "config.json, or download the checkpoint again"
            )


@contextmanager
def limit_model_size(numbers: int, name: str) -> Iterator[None]:
    """Limit the parameters of modules that this thread makes meanwhile, whether on the meta device or in memory.

    Args:
        numbers: how many numbers the weight files hold.
        name: display name of the model, for errors.

    Raises:
        ModelError: the modules have far more; raised while they are made.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    owner, made, filled = threading.get_ident(), 0, 0
    in_memory: set[int] = set()  # a tied matrix is registered several times

    def count(module: torch.nn.Module, parameter_name: str, parameter: torch.Tensor) -> None:
        nonlocal made, filled
        if threading.get_ident() != owner:
            return
        if parameter.is_meta:
            made += parameter.numel()
        elif parameter.data_ptr() not in in_memory:
            in_memory.add(parameter.data_ptr())
            filled += parameter.numel()
        if made > _MADE_FACTOR * numbers or filled > _FILLED_FACTOR * numbers:
            raise ModelError(
                f"base model {name}: config.json describes a model of more than {max(made, filled):.4g} numbers, and "
                f"the weight files hold {numbers:.4g}: correct its sizes and numbers of layers, or download the "
                "checkpoint again"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _fields(value: Any) -> Iterable[tuple[str, Any]]:
    """Every field of a JSON value, of its parts too; a loop, since files may nest deeply."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, Mapping):
            yield from part.items()
            left += part.values()
        elif isinstance(part, list):
            left += part
