"""Key files: which keys the server takes."""

from __future__ import annotations

from pathlib import Path

from adalink.runtime.errors import ConfigError


def read_keys(path: Path) -> tuple[str, ...]:
    """Keys of a file, one a line; raises ``ConfigError`` if there are none or the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"{path} holds no key: write one a line")
    return keys
