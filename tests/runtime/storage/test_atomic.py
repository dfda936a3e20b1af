"""One file at a time, replaced whole or not at all: whatever fails, the old one stays and nothing lies beside it."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from adalink.runtime.errors import WriteError
from adalink.runtime.storage.atomic import check_writable, make_folder, replace_file, sync, write_through

OLD, NEW = b"old", b"new, and longer" * 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file.json").write_bytes(OLD)
    return tmp_path / "file.json"


def unchanged(path: Path) -> bool:
    return path.read_bytes() == OLD and [other.name for other in path.parent.iterdir()] == [path.name]


def test_replace_file_gives_the_new_bytes_alone(path: Path) -> None:
    for data in (NEW, b"", memoryview(OLD)):
        replace_file(path, data, durable=True)
        assert path.read_bytes() == bytes(data)
    assert unchanged(path)


def test_disk_full_half_way_leaves_the_old_file(path: Path) -> None:
    """A real limit on the size of files: the system writes the first bytes and refuses the others."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW) // 2, before[1]))
    try:
        with pytest.raises(WriteError) as caught:
            replace_file(path, NEW, repair="choose another --out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == f"cannot write {path}: File too large; choose another --out"
    assert unchanged(path)


@pytest.mark.parametrize("step", ["open", "fdopen", "write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_at_any_step_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    class Failing:
        def __init__(self, descriptor: int) -> None:
            self.file = open(descriptor, "wb")  # noqa: SIM115  # os.fdopen is what is replaced

        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *arguments: Any) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[:5])
            raise error

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(os, "fdopen", lambda descriptor, mode: Failing(descriptor))
        else:
            patch.setattr(Path if step == "replace" else os, step, fail)
        expected = WriteError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(
            expected, match="No space left on device; free space or" if expected is WriteError else None
        ):
            replace_file(path, NEW, durable=True)
    assert unchanged(path)


def test_link_in_the_way_is_not_followed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: somebody knows the temporary name and has put a link to another file there."""
    victim = path.with_name("victim")
    victim.write_bytes(OLD)
    monkeypatch.setattr(os, "urandom", bytes)
    path.with_name(f".{path.name}.{bytes(4).hex()}").symlink_to(victim)
    with pytest.raises(WriteError, match="File exists"):
        replace_file(path, NEW)
    assert victim.read_bytes() == path.read_bytes() == OLD


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"cannot write .*none/file: No such file or directory; free space or choose"):
        replace_file(tmp_path / "none" / "file", NEW)


def test_killed_at_any_step_leaves_old_or_new(path: Path) -> None:
    """A child dies before its n-th call that changes the disk; readers see one of the two files, whole."""
    seen = set()
    for moment in range(1, 9):
        child = os.fork()
        if child == 0:
            _die_at(moment)
            replace_file(path, NEW, durable=True)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        seen.add(path.read_bytes())
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert status == 0
    assert seen == {OLD, NEW}


def _die_at(moment: int) -> None:
    calls = 0

    def watched(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in ("open", "fdopen", "fsync", "rename", "replace"):
        setattr(os, name, watched(getattr(os, name)))


def test_threads_that_replace_one_file_leave_one_whole(path: Path) -> None:
    contents = [bytes([65 + index]) * 50_000 for index in range(4)]
    threads = [
        threading.Thread(target=lambda own: [replace_file(path, own) for _ in range(20)], args=(own,))
        for own in contents
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_bytes() in (OLD, *contents)
    assert path.read_bytes() in contents
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_private_file_is_its_owners_alone(path: Path) -> None:
    before = os.umask(0o022)
    try:
        replace_file(path, NEW)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        replace_file(path, NEW, private=True)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_flushes_only_where_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    replace_file(path, NEW)
    write_through(path, OLD, durable=False)
    assert not flushed
    replace_file(path, NEW, durable=True)
    write_through(path, OLD)
    sync(path)
    sync(path.parent)
    assert len(flushed) == 4


def test_a_folder_is_tried_before_work_begins(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(path.parent)
    check_writable(path.parent / "to/be/made")
    assert unchanged(path)
    with pytest.raises(WriteError, match=r"cannot write in .*file\.json: Not a directory; choose another"):
        check_writable(path / "below", repair="choose another")
    with pytest.raises(WriteError, match=r"cannot make .*below: Not a directory; choose another"):
        make_folder(path / "below", repair="choose another")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("adalink.runtime.storage.atomic._write", refuse)
    with pytest.raises(WriteError, match="No space left on device"):
        check_writable(path.parent)
    assert unchanged(path)
