"""Parquet files, with the library ``pyarrow``."""

from __future__ import annotations

from collections.abc import Iterator
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
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise BackendUnavailableError(
            f"{path}: Parquet needs pyarrow, which is not installed: pip install pyarrow, which 'adalink-kit[train]' "
            "has too, or save the rows as JSONL or CSV"
        ) from error
    try:
        with ParquetFile(path) as file:
            names = _class_names(file.schema_arrow.metadata or {})
            number = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _plain(row, names, f"{path}: row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read: {reason}; expected a Parquet file") from error


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
