"""Files that are linked where the disk can, so that weights lie on it once."""

from __future__ import annotations

import os
from pathlib import Path


def hard_link(source: Path, target: Path) -> bool:
    """Link a file; whether the disk has such links, and both places are on one disk."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        return False
    return True
