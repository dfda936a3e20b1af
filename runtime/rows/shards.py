"""Data sets in several files: folders that Hugging Face's ``datasets`` writes, and Parquet files as the hub has them.

- ``Dataset.save_to_disk`` writes ``state.json``, which names Arrow files; ``DatasetDict`` one such folder a split.
- Data sets of the hub have ``data/train-00000-of-00002.parquet`` and so on, or the same without ``data``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from adalink.runtime.errors import DataError
from adalink.runtime.rows.lines import is_standard_input
from adalink.runtime.storage.decoding import decode_json
from adalink.runtime.storage.digest import digest_bytes, digest_file

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.parquet")
_STATE, _SPLITS = "state.json", "dataset_dict.json"


def find_shards(path: Path) -> list[Path] | None:
    """The files of a data set in their order; ``None`` for a path that is a single file, or not there.

    Args:
        path: a folder; or the files' common beginning, such as ``data/train``.

    Raises:
        DataError: a folder holds no data set, several splits, or not all of its files.
    """
    if path.is_dir():
        return _in_folder(path)
    if path.exists() or not path.name or is_standard_input(path):
        return None
    splits = _shards(path.parent) or {}
    return _complete(path, splits[path.name]) if path.name in splits else None


def digest_rows(path: Path) -> str:
    """Digest of a file of rows; of a data set in several files, of their names and digests."""
    shards = find_shards(path)
    if shards is None:
        return digest_file(path)
    return digest_bytes("".join(f"{shard.name} {digest_file(shard)}\n" for shard in shards).encode())


def _in_folder(folder: Path) -> list[Path]:
    if (folder / _SPLITS).is_file():
        raise _several(folder, _names(folder / _SPLITS, "splits"))
    if (folder / _STATE).is_file():
        files = [folder / name for name in _names(folder / _STATE, "_data_files")]
        if missing := [path.name for path in files if not path.is_file()]:
            raise DataError(f"{folder}: {missing[0]} is missing, which its {_STATE} names: copy the whole folder")
        return files
    splits = _shards(folder)
    if not splits:
        raise DataError(
            f"{folder} is a folder without a data set, expected a file of rows, a folder of Dataset.save_to_disk, or "
            "Parquet files as a data set of the hub has them"
        )
    if len(splits) > 1:
        raise _several(folder, list(splits))
    name, files = next(iter(splits.items()))
    return _complete(folder / name, files)


def _shards(folder: Path) -> dict[str, list[Path]]:
    """Parquet files of a folder by split, in its ``data`` where that is; a file that is no shard is a split."""
    places = [folder / "data", folder]
    files = next((found for place in places if (found := sorted(place.glob("*.parquet")))), [])
    splits: dict[str, list[Path]] = {}
    for path in files:
        match = _SHARD.fullmatch(path.name)
        splits.setdefault(match[1] if match else path.stem, []).append(path)
    return splits


def _complete(path: Path, files: list[Path]) -> list[Path]:
    """The files, if none is missing; raises ``DataError``."""
    numbered = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if not numbered:
        return files
    count = int(numbered[0][3])
    if [int(match[2]) for match in numbered] != list(range(count)) or len(numbered) != len(files):
        raise DataError(f"{path}: {len(files)} Parquet files, expected those from 0 to {count - 1}: copy all of them")
    return files


def _several(folder: Path, splits: list[str]) -> DataError:
    return DataError(
        f"{folder} holds the splits {', '.join(splits)}, expected one: name it, such as {folder / splits[0]}"
    )


def _names(path: Path, key: str) -> list[str]:
    """Names in a file that ``datasets`` wrote; raises ``DataError``."""
    try:
        entries = decode_json(path.read_bytes(), dict[str, Any])[key]
        names = [entry if isinstance(entry, str) else entry["filename"] for entry in entries]
        if names and all(isinstance(name, str) and Path(name).name == name for name in names):
            return names
    except (OSError, msgspec.DecodeError, KeyError, TypeError):
        pass
    raise DataError(f"{path}: cannot be read, expected what Dataset.save_to_disk writes: copy the folder again")
