"""Data sets in several files, as Hugging Face's ``datasets`` writes them."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from adalink.runtime.errors import DataError
from adalink.runtime.rows.shards import digest_rows
from adalink.runtime.rows.table import read_table

FEATURES = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": ["oil", "tin"], "_type": "ClassLabel"}}
METADATA = {b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()}


def table(*numbers: int) -> pa.Table:
    columns = {"text": [f"text {number}" for number in numbers], "label": [number % 2 for number in numbers]}
    return pa.table(columns).replace_schema_metadata(METADATA)


def save_to_disk(folder: Path, *shards: tuple[int, ...]) -> Path:
    """What ``Dataset.save_to_disk`` writes (5.2): Arrow streams, and which of them belong together."""
    folder.mkdir(parents=True)
    names = [f"data-{place:05}-of-{len(shards):05}.arrow" for place in range(len(shards))]
    for name, numbers in zip(names, shards, strict=True):
        made = table(*numbers)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, made.schema) as stream:
            stream.write_table(made)
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def save_parquet(folder: Path, split: str, *shards: tuple[int, ...]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for place, numbers in enumerate(shards):
        parquet.write_table(table(*numbers), folder / f"{split}-{place:05}-of-{len(shards):05}.parquet")
    return folder


def read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    return [(row.line, row.fields) for row in read_table(path, "x")]


WHOLE = [(n + 1, {"text": f"text {n}", "label": ("oil", "tin")[n % 2]}) for n in range(5)]


def test_folders_are_read_in_the_order_of_their_files(tmp_path: Path) -> None:
    assert read(save_to_disk(tmp_path / "saved", (0, 1), (2,), (3, 4))) == WHOLE
    save_parquet(tmp_path / "hub/data", "train", (0, 1, 2), (3, 4))
    assert read(tmp_path / "hub") == WHOLE
    assert read(tmp_path / "hub/train") == read(tmp_path / "hub/data/train") == WHOLE
    (row, *_) = read_table(tmp_path / "hub", "x")
    assert row.origin == f"{tmp_path / 'hub'}: row 1"


def test_a_split_is_named(tmp_path: Path) -> None:
    for split, numbers in (("train", (0, 1, 2, 3, 4)), ("test", (7,))):
        save_to_disk(tmp_path / "saved" / split, numbers)
        save_parquet(tmp_path / "hub/data", split, numbers)
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for folder, splits in (("saved", "train, test"), ("hub", "test, train")):
        first = tmp_path / folder / splits.split(",")[0]
        message = f"{tmp_path / folder} holds the splits {splits}, expected one: name it, such as {first}"
        with pytest.raises(DataError, match=re.escape(message)):
            read(tmp_path / folder)
        assert read(tmp_path / folder / "train") == WHOLE
        assert len(read(tmp_path / folder / "test")) == 1


@pytest.mark.parametrize("missing", ["data-00001-of-00002.arrow", "data/train-00000-of-00002.parquet"])
def test_a_missing_file_is_an_error(tmp_path: Path, missing: str) -> None:
    """Else half of the rows would be all of them."""
    save_to_disk(tmp_path / "saved", (0, 1), (2, 3)) if missing.endswith("arrow") else save_parquet(
        tmp_path / "saved/data", "train", (0, 1), (2, 3)
    )
    whole = digest_rows(tmp_path / "saved")
    assert len(read(tmp_path / "saved")) == 4
    (tmp_path / "saved" / missing).unlink()
    with pytest.raises(DataError, match=r"is missing, which its state\.json|1 Parquet files, expected those from 0"):
        read(tmp_path / "saved")
    assert whole.startswith("sha256:")


def test_digest_follows_every_file(tmp_path: Path) -> None:
    first, other = (save_to_disk(tmp_path / name, (0, 1), (2,)) for name in ("a", "b"))
    assert digest_rows(first) == digest_rows(other)
    save_to_disk(tmp_path / "c", (0, 1), (3,))
    assert digest_rows(first) != digest_rows(tmp_path / "c")


@pytest.mark.parametrize("text", ["{", "{}", '{"_data_files": []}', '{"_data_files": [{"filename": "../x.arrow"}]}'])
def test_wrong_folders(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match="is a folder without a data set"):
        read(tmp_path)
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(DataError, match=r"state\.json: cannot be read, expected what Dataset\.save_to_disk writes"):
        read(tmp_path)


def test_csv_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("-.csv", b'text,label\n"a, b",oil\n'), ("-.tsv", b"text\tlabel\na, b\toil\n")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        (row,) = read_table(name, "x")
        assert row.fields == {"text": "a, b", "label": "oil"}
        assert row.origin == "standard input:2"
