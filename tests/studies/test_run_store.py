"""Finished runs as files and as a table: nothing is lost, and nothing damaged is believed."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import re

import pytest
from helpers.studies import contents, finished_runs, invoke, invoke_command

from adalink.runtime.errors import BusyError, DataError, WriteError
from studies import run_store
from studies.run_store import TABLE, decode_table, encode_table, pack, read_runs, unpack, write_run


@pytest.fixture
def out(tmp_path):
    """A folder with three runs as files."""
    for name, content in finished_runs(3).items():
        write_run(tmp_path, name, content)
    return tmp_path


def files(out):
    """Bytes of the runs that are files, by name."""
    return {path.name: path.read_bytes() for path in (out / "runs").glob("*")}


def test_pack_and_unpack_give_the_same_files(out):
    before = files(out)
    assert pack(out) == (3, 3)
    assert [path.name for path in out.iterdir()] == [TABLE]
    assert read_runs(out) == {name: json.loads(text) for name, text in before.items()}
    assert unpack(out) == 3
    assert files(out) == before
    assert not (out / TABLE).exists()


def test_pack_of_equal_runs_gives_equal_bytes(out, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for name, content in reversed(finished_runs(3).items()):
        write_run(other, name, content)
        pack(other)  # one by one
    pack(out)
    packed = (out / TABLE).read_bytes()
    assert packed == (other / TABLE).read_bytes()
    assert packed == encode_table(dict(reversed(finished_runs(3).items())))
    assert packed[4:8] == b"\0\0\0\0"  # the time in a gzip header
    changed = (out / TABLE).stat().st_mtime_ns
    assert pack(out) == (0, 3)
    assert (out / TABLE).stat().st_mtime_ns == changed


def test_pack_adds_files_to_the_table(out):
    pack(out)
    (name,) = finished_runs(4).keys() - finished_runs(3).keys()
    write_run(out, name, finished_runs(4)[name])
    assert read_runs(out) == finished_runs(4)
    assert pack(out) == (1, 4)
    assert read_runs(out) == finished_runs(4)
    assert not (out / "runs").exists()


def test_pack_interrupted_after_the_table_loses_nothing(out, monkeypatch):
    monkeypatch.setattr(run_store, "_remove_files", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(out)
    assert len(files(out)) == 3
    assert read_runs(out) == finished_runs(3)
    monkeypatch.undo()
    assert pack(out) == (3, 3)
    assert not (out / "runs").exists()


def test_pack_that_cannot_write_keeps_the_files(out, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_store.os, "fsync", full)
    with pytest.raises(WriteError, match=r"No space left on device; make .* writable"):
        pack(out)
    assert len(files(out)) == 3
    assert [path.name for path in out.iterdir()] == ["runs"]


def test_a_table_that_is_read_back_otherwise_is_not_believed(out, monkeypatch):
    monkeypatch.setattr(run_store, "encode_table", lambda runs: encode_table(dict(list(runs.items())[1:])))
    with pytest.raises(WriteError, match="is not read back as it was written; the runs stay files"):
        pack(out)
    assert len(files(out)) == 3
    assert not (out / TABLE).exists()


def test_two_processes_do_not_pack_one_folder(out):
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for change in (pack, unpack):
        with pytest.raises(BusyError, match="wait for it to end"):
            change(out)
    os.close(descriptor)
    assert pack(out) == (3, 3)


@pytest.mark.parametrize("moment", ["_read_files", "_decode_run"], ids=["before the files", "after the first file"])
def test_runs_packed_while_the_folder_is_read_are_not_missed(out, monkeypatch, moment):
    real = getattr(run_store, moment)

    def packed_meanwhile(argument):
        monkeypatch.undo()
        pack(out)
        return real(argument)

    monkeypatch.setattr(run_store, moment, packed_meanwhile)
    assert read_runs(out) == finished_runs(3)
    assert not (out / "runs").exists()


def test_a_file_that_differs_from_the_table_is_refused(out):
    saved = files(out)
    pack(out)
    name, text = next(iter(saved.items()))
    content = json.loads(text)
    write_run(out, name, content)
    assert read_runs(out) == finished_runs(3)  # the same run twice is no conflict
    content["result"]["accuracy"] += 0.1
    write_run(out, name, content)
    for read in (read_runs, pack, unpack):
        with pytest.raises(DataError, match=rf"{name}: differs from the run of this name in {re.escape(TABLE)}"):
            read(out)
    assert len(decode_table((out / TABLE).read_bytes())) == 3


def _lines(packed):
    return gzip.decompress(packed).splitlines(keepends=True)


DAMAGES = {
    "half of it": (lambda packed: packed[: len(packed) // 2], "cannot be decompressed"),
    "nothing in it": (lambda packed: b"", "holds no line"),
    "a changed byte": (lambda packed: packed[:60] + bytes([packed[60] ^ 1]) + packed[61:], "cannot be decompressed"),
    "no gzip": (lambda packed: b"not a table", "cannot be decompressed: Not a gzipped file"),
    "a line without an end": (lambda packed: gzip.compress(gzip.decompress(packed)[:-1]), "line 3 has no end"),
    "a line cut": (
        lambda packed: gzip.compress(b"".join([_lines(packed)[0][:50] + b"\n", *_lines(packed)[1:]])),
        "line 1: is no finished run",
    ),
    "a line twice": (
        lambda packed: gzip.compress(b"".join([*_lines(packed), _lines(packed)[-1]])),
        "line 4: .*each run once, sorted",
    ),
    "another order": (lambda packed: gzip.compress(b"".join(_lines(packed)[::-1])), "line 2: .*each run once, sorted"),
    "no measurements": (
        lambda packed: gzip.compress(gzip.decompress(packed).replace(b'"loss"', b'"lost"')),
        "line 1: holds a run without its measurements",
    ),
    "an unknown setting": (
        lambda packed: gzip.compress(gzip.decompress(packed).replace(b'"words"', b'"letters"')),
        "line 1: is no finished run",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_refused(out, damage):
    pack(out)
    change, message = DAMAGES[damage]
    (out / TABLE).write_bytes(change((out / TABLE).read_bytes()))
    damaged = (out / TABLE).read_bytes()
    for read in (read_runs, pack, unpack):
        with pytest.raises(DataError, match=rf"{re.escape(TABLE)}: is no table of finished runs: ({message}).*restore"):
            read(out)
    assert (out / TABLE).read_bytes() == damaged
    assert str(out / TABLE) in invoke_command("pack", out, code=2).stderr


def test_a_folder_that_is_none_is_refused(tmp_path):
    for command in ("pack", "unpack"):
        assert "name the folder that a study was run with" in invoke_command(command, tmp_path / "no", code=2).stderr
        assert "holds no" in invoke_command(command, tmp_path).stderr


def test_a_study_goes_on_from_a_table(done, copy, monkeypatch):
    study, out = copy
    runs = contents(out)
    assert "7 runs packed" in invoke_command("pack", out).stderr
    monkeypatch.setattr("studies.schedule.perform", lambda *arguments: pytest.fail("a packed run was done again"))
    assert json.loads(invoke(study, "--out", out, "--json").stdout) == done[2]
    assert "7 runs unpacked" in invoke_command("unpack", out).stderr
    assert contents(out) == runs
