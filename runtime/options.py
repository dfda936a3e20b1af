"""Options for opening a deployment."""

from __future__ import annotations

from dataclasses import dataclass

from adalink.runtime.errors import RequestError

IMAGE_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class OpenOptions:
    """Options of ``Deployment.open``, by the same names.

    Attributes:
        variant: base variant, such as ``"int4"``; by default one that is not quantised, if there is one
            (`adalink.runtime.storage.variants`).
        threads: threads of the engine; all physical cores by default.
        full_check: read every byte of every file, all tasks included. Otherwise a file that this user has verified is
            read again only after a change (`adalink.runtime.storage.verification_cache`).
        task_memory_bytes: limit of loaded adapter weights. Beyond it, the least recently used task is unloaded until
            its next use. No limit by default: the weights are mapped files, whose pages the system can reclaim.
        prefix_cache_bytes: size of the prefix cache. ``generate`` continues from the longest prefix that a prompt
            shares with an earlier one under the same adapter. 0 turns it off.
        image_cache_bytes: size of the cache of image embeddings, which all tasks share; 0 turns it off.

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
