"""Files of the user's own: whole or not there, and nothing is left of what could not be written."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from adalink.runtime.storage import atomic
from adalink.runtime.storage.user_cache import read_cache_file, write_cache_file


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kind" / "file"
    write_cache_file(path, b"before")
    assert read_cache_file(path) == b"before"

    def half(path: Path, data: bytes, **options: bool) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_through", half)
        write_cache_file(path, b"after, and longer")
    assert read_cache_file(path) == b"before"
    assert [other.name for other in path.parent.iterdir()] == ["file"]
    write_cache_file(path, b"after")
    assert read_cache_file(path) == b"after"
