"""Options for opening a deployment."""

from __future__ import annotations

from dataclasses import dataclass

from adalink.runtime.arguments import check_flag, check_name, check_whole

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
        slots: most requests that decode together; 64 by default. Further ones wait for a place.
        context: most positions of a request, prompt and reply together. Memory for ``slots`` of them is taken once and
            kept. By default the base's own limit holds, and memory follows the requests.
        queue_limit: most requests that wait; further ones are refused. Any number by default.
        kv_cache_dtype: dtype of the KV cache, such as ``"int8"``, where the variant has a graph for it
            (`adalink.export.base.kv_cache`); the base's own by default.
        gpu_layers: layers whose weights llama.cpp puts on a GPU, where it was built for one; none by default.

    Raises:
        RequestError: a value is of a wrong type, or a number is less than 1, that of a cache less than 0.
    """

    variant: str | None = None
    threads: int | None = None
    full_check: bool = False
    task_memory_bytes: int | None = None
    prefix_cache_bytes: int = 0
    image_cache_bytes: int = IMAGE_CACHE_BYTES
    slots: int | None = None
    context: int | None = None
    queue_limit: int | None = None
    kv_cache_dtype: str | None = None
    gpu_layers: int | None = None

    def __post_init__(self) -> None:
        if self.variant is not None:
            check_name(self.variant, "variant")
        if self.kv_cache_dtype is not None:
            check_name(self.kv_cache_dtype, "kv_cache_dtype")
        check_flag(self.full_check, "full_check")
        for name in ("threads", "task_memory_bytes", "slots", "context", "queue_limit", "gpu_layers"):
            if getattr(self, name) is not None:
                check_whole(getattr(self, name), name, 1)
        for name in ("prefix_cache_bytes", "image_cache_bytes"):
            check_whole(getattr(self, name), name, 0)
