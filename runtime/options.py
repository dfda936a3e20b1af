"""How a deployment is opened."""

from __future__ import annotations

from dataclasses import dataclass

from adalink.runtime.errors import RequestError

IMAGE_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class OpenOptions:
    """Options of ``Deployment.open``, by the same names.

    Attributes:
        variant: which form of the base, such as ``"int4"``; by default one that is not quantised, if there is one
            (`adalink.runtime.storage.variants`).
        threads: threads of the engine; all physical cores by default.
        full_check: read every byte of every file, those of all tasks included. Without it, files that this user has
            checked before and that have not changed since are not read again
            (`adalink.runtime.storage.verification_cache`).
        task_memory_bytes: adapter weights that are held at a time. Beyond it, the least recently used task is unloaded
            until it is asked for again. No limit by default: the weights of the deployment's tasks are mapped files,
            whose pages the system takes back when memory is short.
        prefix_cache_bytes: memory of the prefix cache. ``generate`` goes on from the longest prefix that a prompt
            shares with an earlier one under the same adapter. 0 keeps nothing.
        image_cache_bytes: memory for embeddings of images, which serve every task; 0 keeps nothing between calls.

    Raises:
        RequestError: ``task_memory_bytes`` is less than 1, ``prefix_cache_bytes`` or ``image_cache_bytes`` less than 0.
    """

    variant: str | None = None
    threads: int | None = None
    full_check: bool = False
    task_memory_bytes: int | None = None
    prefix_cache_bytes: int = 0
    image_cache_bytes: int = IMAGE_CACHE_BYTES

    def __post_init__(self) -> None:
        if self.task_memory_bytes is not None and self.task_memory_bytes < 1:
            raise RequestError(f"task_memory_bytes is {self.task_memory_bytes}, expected at least 1")
        for name in ("prefix_cache_bytes", "image_cache_bytes"):
            if (size := getattr(self, name)) < 0:
                raise RequestError(f"{name} is {size}, expected at least 0, which keeps nothing")
