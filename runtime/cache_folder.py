"""The folder that this user's programs keep what they can do without."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path | None:
    """``~/.cache/adalink``, or what the system has in its stead; ``None`` for a user who has no home."""
    windows = sys.platform == "win32"
    root = os.environ.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME")
    try:
        return Path(root or Path.home() / ("AppData/Local" if windows else ".cache"), "adalink")
    except RuntimeError:
        return None
