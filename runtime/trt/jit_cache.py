"""What TensorRT-RTX compiled for this GPU at run time, kept for the next process; nothing for TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adalink.runtime.storage.digest import digest_bytes
from adalink.runtime.storage.user_cache import cache_path, read_cache_file, write_cache_file
from adalink.runtime.trt.api import Api
from adalink.runtime.trt.record import RECORD_FILE


class JitCache:
    """The runtime cache of one plan; the library checks itself whether it fits GPU, driver and version.

    Attributes:
        config: what contexts are made with; ``None`` where there is no such cache.
    """

    def __init__(self, api: Api, engine: Any, plan: Path) -> None:
        self.config, self._cache = api.runtime_config(engine)
        self._path: Path | None = None
        if self._cache is not None:
            # The record tells engines apart as well as the plan does, and is not read in half a second.
            key = digest_bytes(plan.with_name(RECORD_FILE).read_bytes() + plan.name.encode())
            self._path = cache_path("jit", f"{key.removeprefix('sha256:')[:32]}.bin")
        data = None if self._path is None else read_cache_file(self._path)
        if data is not None and self._cache is not None:
            self._cache.deserialize(data)

    def save(self) -> None:
        """Write what was compiled."""
        if self._path is not None:
            write_cache_file(self._path, memoryview(self._cache.serialize()))
