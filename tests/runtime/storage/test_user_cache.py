"""Files of the user's own: whole or not there, and nothing is left of what could not be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from adalink.runtime.storage import atomic
from adalink.runtime.storage.user_cache import make_private_folder, read_cache_file, write_cache_file


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kind" / "file"
    write_cache_file(path, b"before")
    assert read_cache_file(path) == b"before"

    def half(stream: BinaryIO, **options: bool) -> None:
        stream.truncate(stream.tell() // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_flush", half)
        write_cache_file(path, b"after, and longer")
    assert read_cache_file(path) == b"before"
    assert [other.name for other in path.parent.iterdir()] == ["file"]
    write_cache_file(path, b"after")
    assert read_cache_file(path) == b"after"


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A file of the cache that this user wrote."""
    path = tmp_path / "adalink" / "kind" / "file"
    write_cache_file(path, b"data")
    assert read_cache_file(path) == b"data"
    return path


@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_may_write_is_not_read(cached: Path, level: int, mode: int) -> None:
    changed = [cached, *cached.parents][level]
    changed.chmod(changed.stat().st_mode | mode)
    assert read_cache_file(cached) is None


def test_what_another_user_owns_is_not_read(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of file and folders alone, by what the system says of it."""
    real_fstat, real_lstat, inode = os.fstat, Path.lstat, 0

    def foreign(status: os.stat_result) -> os.stat_result:
        fields = list(status)
        fields[4] += status.st_ino == inode  # st_uid
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", lambda descriptor: foreign(real_fstat(descriptor)))
    monkeypatch.setattr(Path, "lstat", lambda path: foreign(real_lstat(path)))
    for path in [cached, *cached.parents][:3]:
        inode = path.stat().st_ino
        assert read_cache_file(cached) is None, path
    inode = 0
    assert read_cache_file(cached) == b"data"


def test_folder_of_another_user_is_not_written_to(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    write_cache_file(cached, b"other")
    assert cached.read_bytes() == b"data"
    assert [path.name for path in cached.parent.iterdir()] == ["file"]


def test_links_in_the_cache_are_not_followed(cached: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    cached.rename(victim)
    cached.symlink_to(victim)
    assert read_cache_file(cached) is None
    cached.unlink()
    elsewhere = tmp_path / "elsewhere"
    cached.parent.rename(elsewhere)
    cached.parent.symlink_to(elsewhere)
    write_cache_file(cached, b"new")
    assert list(elsewhere.iterdir()) == []
    assert victim.read_bytes() == b"data"


def test_pipe_in_the_cache_does_not_wait(cached: Path) -> None:
    cached.unlink()
    os.mkfifo(cached)
    assert read_cache_file(cached) is None


def test_own_folders_of_earlier_kits_are_closed_to_others(cached: Path) -> None:
    """They were made with the rights that the umask left."""
    for folder in (cached.parent, cached.parent.parent):
        folder.chmod(0o775)
    assert read_cache_file(cached) is None
    write_cache_file(cached, b"new")
    assert read_cache_file(cached) == b"new"
    assert {folder.stat().st_mode & 0o777 for folder in (cached.parent, cached.parent.parent)} == {0o755}


def test_folder_whose_files_others_read_is_not_mended(tmp_path: Path) -> None:
    engines = tmp_path / "adalink" / "engines" / "digest"
    assert make_private_folder(engines, levels=3)
    engines.chmod(0o777)
    assert not make_private_folder(engines, levels=3)
