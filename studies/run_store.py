"""The finished runs of a study: one file a run while it goes on, one compressed table afterwards.

A study's folder holds ``runs/{choose,final}-<digest>.json``, ``runs.jsonl.gz`` or both. The table has one line a run,
sorted by the name that its file would have. Equal runs give an equal table: no time and no name of a machine is in it.
"""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from adalink.runtime.errors import BusyError, DataError, WriteError
from adalink.runtime.storage.decoding import decode_json
from adalink.tools.common.report_file import write_json
from studies.experiment.run_settings import Run

TABLE = "runs.jsonl.gz"
FinishedRuns = dict[str, dict[str, Any]]
_FOLDER = "runs"
_MEASUREMENTS = {"accuracy", "loss", "rows", "score_seconds", "train_seconds"}


def read_runs(out: Path) -> FinishedRuns:
    """The finished runs of a study's folder by file name, those of other studies among them.

    Raises:
        DataError: the table is damaged, a file is not what a run leaves or is named for another run, or table and file
            disagree on a run.
    """
    files = _read_files(out)  # before the table: what is packed meanwhile is in the one or in the other
    table = _read_table(out / TABLE)
    for name in sorted(table.keys() & files.keys()):
        if table[name] != files[name]:
            raise DataError(
                f"{out / _FOLDER / name}: differs from the run of this name in {TABLE}, expected the same run in both; "
                f"remove the file to keep the table's, or unpack another copy of the study and keep the file there"
            )
    return dict(sorted({**table, **files}.items()))


def write_run(out: Path, name: str, content: Mapping[str, Any]) -> None:
    """Keep a finished run as a file, whole or not at all; raises ``WriteError``."""
    write_json(runs_folder(out) / name, content, option="--out")


def runs_folder(out: Path) -> Path:
    """Where finished runs are written, made if need be; raises ``WriteError``."""
    folder = out / _FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"study: cannot make {folder}: {error.strerror}; choose a writable --out") from error
    return folder


def pack(out: Path) -> tuple[int, int]:
    """Fold the files of finished runs into the table, and remove them once the table is on disk.

    A crash leaves each run in the table, in its file, or in both, which ``read_runs`` accepts.

    Args:
        out: the study's folder.

    Returns:
        how many files were folded in, and how many runs the table holds.

    Raises:
        BusyError: another process packs or unpacks this folder.
        DataError: as for ``read_runs``; nothing is changed then.
        WriteError: the folder cannot be written.
    """
    with _lock(out):
        runs, names = read_runs(out), sorted(_read_files(out))
        if names:
            _replace_table(out, runs)
            _remove_files(out, names)
        return len(names), len(runs)


def unpack(out: Path) -> int:
    """Write every run of the table as a file, and remove the table: single runs can then be looked at or removed.

    Args:
        out: the study's folder.

    Returns:
        how many runs were in the table.

    Raises:
        BusyError: another process packs or unpacks this folder.
        DataError: as for ``read_runs``; nothing is changed then.
        WriteError: the folder cannot be written.
    """
    with _lock(out):
        runs, files = read_runs(out), _read_files(out)
        table = _read_table(out / TABLE)
        for name in table.keys() - files.keys():
            write_run(out, name, runs[name])
        (out / TABLE).unlink(missing_ok=True)
        return len(table)


def encode_table(runs: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The bytes of the table: lines of strict JSON, sorted by file name, compressed without a time."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as stream:
        for _, content in sorted(runs.items()):
            stream.write(json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n")
    return buffer.getvalue()


def decode_table(packed: bytes) -> FinishedRuns:
    """The runs of a table by file name.

    Raises:
        ValueError: the table is damaged; the message says where.
    """
    try:
        lines = gzip.decompress(packed).split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot be decompressed: {error}") from error
    if lines.pop():
        raise ValueError(f"line {len(lines) + 1} has no end")
    if not lines:
        raise ValueError("holds no line")
    runs: FinishedRuns = {}
    last = ""
    for number, line in enumerate(lines, start=1):
        try:
            name, content = _decode_run(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if name <= last:
            raise ValueError(f"line {number}: {name} after {last}, expected each run once, sorted by name")
        runs[name] = content
        last = name
    return runs


def _decode_run(text: bytes) -> tuple[str, dict[str, Any]]:
    """File name and content of a finished run; raises ``ValueError``."""
    try:
        content = decode_json(text, dict[str, Any])
        name = msgspec.convert(content["run"], Run).file_name
        measurements = set(content["result"])
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise ValueError(f"is no finished run: {error}") from error
    if not measurements >= _MEASUREMENTS:
        raise ValueError("holds a run without its measurements")
    return name, content


def _read_table(path: Path) -> FinishedRuns:
    """The runs of a table, none where there is no table; raises ``DataError``."""
    try:
        packed = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; make it readable") from error
    try:
        return decode_table(packed)
    except ValueError as error:
        raise DataError(
            f"{path}: is no table of finished runs: {error}; restore the file from a copy or from version control, or "
            "remove it, and its runs are done again"
        ) from error


def _read_files(out: Path) -> FinishedRuns:
    """The runs that are files; raises ``DataError``."""
    runs: FinishedRuns = {}
    for path in sorted((out / _FOLDER).glob("*.json")):
        try:
            name, content = _decode_run(path.read_bytes())
        except FileNotFoundError:  # packed since the folder was listed
            continue
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; make it readable") from error
        except ValueError as error:
            raise DataError(f"{path}: {error}; remove it, and the run is done again") from error
        if name != path.name:
            raise DataError(
                f"{path}: holds the run {name}, expected the run that it is named for; remove it, and the run is done "
                "again"
            )
        runs[name] = content
    return runs


def _replace_table(out: Path, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the table beside the old one, check it, and rename it in; raises ``WriteError``."""
    try:
        handle, staging = tempfile.mkstemp(prefix=f".{TABLE}.", dir=out)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(encode_table(runs))
                stream.flush()
                os.fsync(stream.fileno())
            if decode_table(Path(staging).read_bytes()) != runs:
                raise WriteError(f"study: {out / TABLE} is not read back as it was written; the runs stay files")
            Path(staging).chmod(0o644)
            Path(staging).replace(out / TABLE)
        except BaseException:
            Path(staging).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WriteError(f"study: cannot write {out / TABLE}: {error.strerror}; make {out} writable") from error


def _remove_files(out: Path, names: list[str]) -> None:
    """Remove files of runs that are in the table, and their folder once it is empty; raises ``WriteError``."""
    try:
        for name in names:
            (out / _FOLDER / name).unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"study: cannot remove {error.filename}: {error.strerror}; make it writable") from error
    with suppress(OSError):  # a study that is under way may have written another run
        (out / _FOLDER).rmdir()


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keep others from packing this folder; the system drops the lock when the process ends, however it ends."""
    try:
        descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror}; name the folder that a study was run with as --out") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise BusyError(f"{out}: another process packs or unpacks its runs: wait for it to end") from error
    finally:
        os.close(descriptor)
