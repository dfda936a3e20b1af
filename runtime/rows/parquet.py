"""Parquet and Arrow files, with the library ``pyarrow``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from adalink.runtime.errors import BackendUnavailableError, DataError
from adalink.runtime.storage.decoding import decode_json

_ROWS_AT_ONCE = 1024


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a Parquet file, some at a time, with their numbers from 1; empty values are left out.

    Dates are texts, and bytes are base64. Class labels of Hugging Face's ``datasets``, which are numbers in the file,
    get the names that the file's metadata holds.

    Raises:
        BackendUnavailableError: ``pyarrow`` is not installed.
        DataError: the file cannot be read.
    """
    with _refusals(path, "a Parquet file"):
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            yield from _rows(file.schema_arrow, file.iter_batches(_ROWS_AT_ONCE), path)


def read_arrow(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of an Arrow file as ``Dataset.save_to_disk`` writes it; as ``read_parquet``."""
    with _refusals(path, "an Arrow file of Dataset.save_to_disk"):
        from pyarrow.ipc import open_stream

        with path.open("rb") as file, open_stream(file) as stream:
            yield from _rows(stream.schema, stream, path)


@contextmanager
def _refusals(path: Path, expected: str) -> Iterator[None]:
    try:
        import pyarrow
    except ImportError as error:
        raise BackendUnavailableError(
            f"{path}: Parquet needs pyarrow, which is not installed: pip install pyarrow, which the extra `train` has "
            "too, or save the rows as JSONL or CSV"
        ) from error
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read: {reason}; expected {expected}") from error


def _rows(schema: Any, batches: Iterable[Any], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    names, number = _class_names(schema.metadata or {}), 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, _plain(row, names, f"{path}: row {number}")


def _plain(row: dict[str, Any], names: dict[str, list[str]], origin: str) -> dict[str, Any]:
    """Values as JSON has them."""
    values = {name: msgspec.to_builtins(value, str_keys=True) for name, value in row.items() if value is not None}
    for name in names.keys() & values.keys():
        number = values[name]
        if not isinstance(number, int) or not 0 <= number < len(names[name]):
            raise DataError(f"{origin}: {name} is {number!r}, expected one of the file's {len(names[name])} classes")
        values[name] = names[name][number]
    return values


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Names of classes of each column with class labels."""
    try:
        features = decode_json(metadata.get(b"huggingface", b"{}"), dict[str, Any])["info"]["features"]
        return {
            name: list(map(str, feature["names"]))
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return {}
