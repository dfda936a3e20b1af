"""Results on the disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adalink.tools.common.report_file import write_json

Result = dict[str, Any]


class Store:
    """Results on the disk, each under a name, good for as long as ``key`` is the same."""

    def __init__(self, folder: Path, key: str, progress: Callable[[str], None]) -> None:
        self._folder = folder
        self._key = key
        self._progress = progress
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[], Result]) -> Result:
        """The stored result, or else a new one, stored; what ``make`` raises is not stored."""
        path = self._folder / f"{name}.json"
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["key"] == self._key:
                self._progress(f"{name}: measured before, kept")
                return dict(stored["result"])
        result = make()
        write_json(path, {"key": self._key, "result": result})
        return result
