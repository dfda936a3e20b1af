"""Threads of PyTorch beside those of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set PyTorch's number of threads, at least 1, until the block ends.

    Threads of PyTorch and of the engine wait by spinning. On the same cores they slow each other down many times, so
    PyTorch gets half of the cores where both compute in turns.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)
