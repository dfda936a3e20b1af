"""JIT cache: kernels that TensorRT-RTX compiled for this GPU, kept for the next process. TensorRT has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adalink.runtime.storage.digest import digest_bytes
from adalink.runtime.storage.user_cache import cache_path, read_cache_file, write_cache_file
from adalink.runtime.trt.api import Api
from adalink.runtime.trt.record import RECORD_FILE


class JitCache:
    """Runtime cache of one plan; the library checks that it fits GPU, driver and version.

    Attributes:
        config: the configuration of new contexts; ``None`` without a cache.
    """

    def __init__(self, api: Api, engine: Any, plan: Path) -> None:
        self.config, self._cache = api.runtime_config(engine)
        self._path: Path | None = None
        if self._cache is not None:
            # The record identifies an engine as well as the plan does, and is much faster to read.
            key = digest_bytes(plan.with_name(RECORD_FILE).read_bytes() + plan.name.encode())
            self._path = cache_path("jit", f"{key.removeprefix('sha256:')[:32]}.bin")
        data = None if self._path is None else read_cache_file(self._path)
        if data is not None and self._cache is not None:
            self._cache.deserialize(data)

    def save(self) -> None:
        """Write the compiled kernels."""
        if self._path is not None:
            write_cache_file(self._path, memoryview(self._cache.serialize()))
