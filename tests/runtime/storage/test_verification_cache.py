"""Files that were checked are not read again until they change; every kind of change is noticed."""

from __future__ import annotations

import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.runtime import let_files_settle

from adalink.runtime import Deployment
from adalink.runtime.errors import IntegrityError
from adalink.runtime.storage import integrity
from adalink.runtime.storage import verification_cache as verified
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.verification_cache import verify_once

TABLE = "base/onnxruntime-cpu/model.onnx.data"  # its head is the table


@pytest.fixture
def settled(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A deployment whose files are older than the margin, and a memory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = Path(shutil.copytree(llama.folder, tmp_path / "copy"))
    let_files_settle(monkeypatch)
    return copy


def read_paths(folder: Path) -> list[str]:
    """Which files a check of the base reads."""
    manifest = read_manifest(folder)
    variant = next(iter(manifest.variants.values()))
    read: list[str] = []
    verify_once(folder, manifest, (manifest.base.embeddings, *variant.files), read.append)
    return read


def flip(path: Path) -> None:
    """Change the last byte in place: same size, same inode."""
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))


def test_unchanged_files_are_read_once(settled: Path) -> None:
    assert TABLE in read_paths(settled)
    assert len(read_paths(settled)) == 0
    with Deployment.open(settled) as opened:
        assert opened.receipt().unchanged


def test_every_change_is_noticed(settled: Path) -> None:
    read_paths(settled)
    path = settled / TABLE
    before = path.stat()

    flip(path)
    with pytest.raises(IntegrityError, match="it was altered"):
        Deployment.open(settled)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the time of writing, forged
    with pytest.raises(IntegrityError, match="it was altered"):
        Deployment.open(settled)
    flip(path)
    Deployment.open(settled).close()

    other = path.with_name("other")
    shutil.copy2(path, other)
    flip(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)  # another file under the same name
    with pytest.raises(IntegrityError, match="it was altered"):
        Deployment.open(settled)
    path.write_bytes(b"short")
    with pytest.raises(IntegrityError, match="5 bytes"):
        Deployment.open(settled)
    path.unlink()
    with pytest.raises(IntegrityError, match="cannot be found"):
        Deployment.open(settled)


def test_another_manifest_is_another_truth(settled: Path) -> None:
    """The memory holds digests, not verdicts: a manifest that demands another digest is checked anew."""
    import msgspec

    read_paths(settled)
    manifest = read_manifest(settled)
    for change, message in (
        ({"sha256": "sha256:" + "0" * 64}, "the manifest says sha256:000"),
        ({"size_bytes": 7}, "bytes, the manifest says 7"),
    ):
        record = msgspec.structs.replace(manifest.files[TABLE], **change)
        forged = msgspec.structs.replace(manifest, files={**manifest.files, TABLE: record})
        with pytest.raises(IntegrityError, match=message):
            verify_once(settled, forged, [TABLE])


def test_what_is_checked_later_does_not_push_out_what_was_before(settled: Path) -> None:
    manifest, read = read_manifest(settled), list[str]()
    other = manifest.base.tokenizer
    for paths in ([TABLE], [other], [TABLE, other]):
        verify_once(settled, manifest, paths, read.append)
    assert read == [TABLE, other]


def test_files_are_told_one_after_another_and_each_is_checked(settled: Path) -> None:
    """They are hashed by several threads; the callback belongs to the caller's, and no thread's error is lost."""
    manifest, threads, told = read_manifest(settled), set[int](), list[str]()

    def note(path: str) -> None:
        threads.add(threading.get_ident())
        told.append(path)

    integrity.verify_files(settled, manifest, None, note)
    assert (threads, told) == ({threading.get_ident()}, sorted(manifest.files))
    for path in (told[0], told[len(told) // 2], told[-1]):
        flip(settled / path)
        with pytest.raises(IntegrityError, match=rf"{re.escape(path)} has digest"):
            integrity.verify_files(settled, manifest)
        flip(settled / path)


def test_a_file_that_is_exchanged_while_it_is_read_is_not_remembered(
    settled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stood there before the reading was never read, whatever its stamp."""
    manifest, read = read_manifest(settled), list[str]()
    stamp = verified.stamp_at(settled / TABLE)
    earlier = (*stamp[:3], stamp[3] - 1, stamp[4])
    found = earlier
    monkeypatch.setattr(verified, "stamp_at", lambda path: found)

    def note(path: str) -> None:
        nonlocal found
        read.append(path)
        found = stamp

    for _ in range(2):
        found = earlier
        verify_once(settled, manifest, [TABLE], note)
    assert read == [TABLE, TABLE]
    verify_once(settled, manifest, [TABLE], note)
    assert read == [TABLE] * 3, "nor was it remembered for what it became"


def test_files_that_just_changed_are_not_remembered(llama: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(llama.folder, tmp_path / "copy"))
    assert read_paths(copy) == read_paths(copy) != []


def test_full_check_sees_what_the_stamps_hide(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a disk that alters a byte without a stamp changing."""
    read_paths(settled)
    true_stamp, target = verified.stamp_at, settled / TABLE
    old = true_stamp(target)
    flip(target)
    for module in (verified, integrity):
        monkeypatch.setattr(module, "stamp_at", lambda path: old if path == target.resolve() else true_stamp(path))
    Deployment.open(settled).close()
    with pytest.raises(IntegrityError, match="it was altered"):
        Deployment.open(settled, full_check=True)


def test_a_memory_that_cannot_be_trusted_or_written_is_ignored(
    settled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_paths(settled)
    (memory,) = (tmp_path / "cache" / "adalink" / "verified").iterdir()
    assert memory.stat().st_mode & 0o077 == 0
    whole = memory.read_bytes()
    memory.chmod(0o666)
    assert read_paths(settled) == first
    for damaged in (b"", whole[:-3], b'{"a": 1}', b"\xff"):
        memory.write_bytes(damaged)
        assert read_paths(settled) == first  # and it is whole again
        assert len(read_paths(settled)) == 0
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert read_paths(settled) == read_paths(settled) == first
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert read_paths(settled) == read_paths(settled) == first
