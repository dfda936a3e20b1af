"""One copy of a tied table: rows that are read from the weights of the head, against PyTorch's embedding module."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers.export import skip_windows_of_old
from helpers.runtime import reseal
from helpers.tied_codes import WIDTH, tied
from helpers.tiny_models import FAMILIES, VOCAB_SIZE

from adalink.export.base.export import export_base
from adalink.export.table_file import write_out
from adalink.export.writer import remove_variant
from adalink.runtime import Deployment, Reload
from adalink.runtime.errors import ContractError, IntegrityError
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.table_schema import CODES
from adalink.tools.commands.inspect import describe_deployment
from adalink.tools.parity.checks.adapter import check_table
from adalink.training.models.loading import base_fingerprint


def rows_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        rows: np.ndarray = model.get_input_embeddings()(torch.arange(VOCAB_SIZE)).numpy()
    return rows


def looked_up(folder: Path, **options: Any) -> np.ndarray:
    with Deployment.open(folder, **options) as deployment:
        rows: np.ndarray = deployment.input_embeddings(np.arange(VOCAB_SIZE)[None])[0]
    return rows


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, folder = tied(is_exact=True), tmp_path_factory.mktemp("shared") / "deployment"
    export_base(model, folder, quantization="int8")
    return model, folder


def test_the_heads_codes_are_the_table(shared: tuple[Any, Path]) -> None:
    model, folder = shared
    base = read_manifest(folder).base
    assert base.embeddings == "base/int8/model.onnx.data"
    assert describe_deployment(folder)["base"]["embedding_table"]["size_bytes"] == 0
    assert base.table is not None
    assert (base.table.encoding, base.table.head is None) == (CODES, False)
    assert not (folder / "base" / "embeddings.safetensors").exists()
    assert base.fingerprint == base_fingerprint(model)
    assert looked_up(folder).tobytes() == rows_of(model).tobytes()
    with Deployment.open(folder) as deployment:
        assert deployment.receipt().unchanged


def test_codes_that_round_a_row_are_not_taken(tmp_path: Path) -> None:
    """The last row is off the grid of its codes; it stays in a file of its own, and the same bits are looked up."""
    model = tied(is_exact=False)
    base = export_base(model, tmp_path, quantization="int8").base
    assert base.embeddings == "base/embeddings.safetensors"
    assert looked_up(tmp_path).tobytes() == rows_of(model).tobytes()


def half_gemma() -> Any:
    """A tied model whose embedding module scales, of numbers that fit 16 bits."""
    skip_windows_of_old("gemma3")  # in standard operators ONNX Runtime turns the head's rows into columns
    model = FAMILIES["gemma3"]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


@pytest.mark.parametrize(
    ("make", "options", "encoding"),
    [
        (FAMILIES["llama"], {}, "float32"),
        (FAMILIES["llama"], {"target": "portable"}, "float32"),
        (FAMILIES["llama"], {"dtype": "float16"}, "float16"),
        (half_gemma, {}, "float32"),
        (FAMILIES["t5"], {"target": "portable"}, "float32"),
    ],
    ids=["grouped", "portable", "float16", "scaled", "encoder-decoder"],
)
def test_the_rows_of_a_float_head_are_the_table(make: Any, options: Any, encoding: str, tmp_path: Path) -> None:
    model = make()
    manifest = export_base(model, tmp_path, **options)
    base, dtype = manifest.base, getattr(torch, options.get("dtype", "float32"))
    assert base.table is not None
    assert (base.table.encoding, base.table.rows_start is None) == (encoding, False)
    assert [base.embeddings in variant.files for variant in manifest.variants.values()] == [True]
    assert not list(tmp_path.rglob("embeddings.safetensors"))
    assert base.fingerprint == base_fingerprint(model)
    assert looked_up(tmp_path).tobytes() == rows_of(model.to(dtype)).tobytes()


def test_an_untied_head_is_no_table(tmp_path: Path) -> None:
    """Its matrix has the table's shape and other numbers."""
    model = FAMILIES["qwen2"]()
    base = export_base(model, tmp_path).base
    assert base.embeddings == "base/embeddings.safetensors"
    assert looked_up(tmp_path).tobytes() == rows_of(model).tobytes()


@pytest.mark.parametrize(
    ("make", "first", "second", "left"),
    [
        (lambda: tied(is_exact=True), {"quantization": "int8"}, {"target": "portable"}, CODES),
        (half_gemma, {}, {"quantization": "int4"}, "bfloat16"),
        (FAMILIES["llama"], {}, {"quantization": "int4"}, None),
        (FAMILIES["gemma3"], {"target": "portable"}, {"quantization": "int4"}, "float32"),
    ],
    ids=["codes", "16 bits", "float32", "float32 and a scale"],
)
def test_the_table_stays_when_the_variant_goes(make: Any, first: Any, second: Any, left: str, tmp_path: Path) -> None:
    """It is written out of the data that go, in as few bytes as hold it, and is later found in another head again."""
    model = make()
    before = export_base(model, tmp_path, **first)
    manifest = export_base(model, tmp_path, **second)
    assert manifest.base == before.base
    (name,), (other,) = before.variants, manifest.variants.keys() - before.variants.keys()
    remove_variant(tmp_path, name)
    manifest = read_manifest(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {*manifest.files, "manifest.json", ".lock"}
    suffix = "data" if left == CODES else "safetensors"
    assert manifest.base.embeddings == f"base/table/embeddings.{suffix}"
    assert (manifest.base.table and manifest.base.table.encoding) == left
    assert manifest.base.fingerprint == base_fingerprint(model)
    described = describe_deployment(tmp_path)["base"]["embedding_table"]
    assert described["size_bytes"] == (tmp_path / manifest.base.embeddings).stat().st_size
    verify_files(tmp_path, manifest)
    assert looked_up(tmp_path, variant=other).tobytes() == rows_of(model).tobytes()
    export_base(model, tmp_path, **first)
    assert read_manifest(tmp_path).base.table == before.base.table
    assert looked_up(tmp_path).tobytes() == rows_of(model).tobytes()


def test_a_variant_written_again_holds_the_table(shared: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = shared
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    manifest = export_base(model, copied, quantization="int8", replace=True)
    assert manifest.base.embeddings == "base/int8.2/model.onnx.data"
    assert not list((copied / "base").glob("int8/*"))
    assert looked_up(copied).tobytes() == rows_of(model).tobytes()


def test_an_open_deployment_goes_on_where_the_table_has_moved(tmp_path: Path) -> None:
    """Another variant takes the table along, and leaves it; the one that is open has the same rows."""
    model = FAMILIES["llama"]()
    export_base(model, tmp_path, quantization="int4")
    with Deployment.open(tmp_path, variant="int4") as deployment:
        before, places = deployment.run(input_ids=[[5, 6]])["logits"], set()
        for change in (export_base, remove_variant):
            change(*((model, tmp_path) if change is export_base else (tmp_path, "onnxruntime-cpu")))
            assert deployment.reload() == Reload()
            places.add(deployment.manifest.base.embeddings)
            assert deployment.receipt().unchanged
            assert np.array_equal(deployment.run(input_ids=[[5, 6]])["logits"], before)
        assert places == {"base/onnxruntime-cpu/model.onnx.data", "base/table/embeddings.safetensors"}
        other = msgspec.structs.replace(deployment.manifest.base, fingerprint=f"sha256:{'0' * 64}")
        reseal(tmp_path, base=other)
        with pytest.raises(ContractError, match="fingerprint is"):
            deployment.reload()


def test_altered_data_are_not_written_out(shared: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = shared
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    manifest = export_base(model, copied, target="portable")
    path = copied / manifest.base.embeddings
    data = bytearray(path.read_bytes())
    data[manifest.base.table.head.codes_start] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="has digest"):
        remove_variant(copied, "int8")
    assert read_manifest(copied) == manifest


def test_what_is_written_out_is_read_back(
    shared: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: the scales lie one number off."""
    folder, replace = shared[1], msgspec.structs.replace

    def off(struct: Any, **changes: Any) -> Any:
        if "scales_start" in changes:
            changes["scales_start"] -= 4
        return replace(struct, **changes)

    monkeypatch.setattr(msgspec.structs, "replace", off)
    with pytest.raises(IntegrityError, match="other rows than base/int8"):
        write_out(folder, read_manifest(folder), "table", tmp_path / "table")


def test_verify_finds_a_code_that_differs(shared: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = shared
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    base = read_manifest(copied).base
    path = copied / base.embeddings
    data = bytearray(path.read_bytes())
    data[base.table.head.codes_start + 40 * WIDTH + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="has digest"):
        Deployment.open(copied)
    reseal(copied)
    reference: Any = SimpleNamespace(embeddings=lambda ids: rows_of(model)[ids].astype(np.float64))
    with Deployment.open(copied) as deployment:
        assert not check_table(deployment, reference).passed
    with Deployment.open(folder) as deployment:
        assert check_table(deployment, reference).passed
    path.write_bytes(data[: base.table.head.codes_start + 100])
    reseal(copied)
    with pytest.raises(IntegrityError, match="Export the base again"):
        Deployment.open(copied)
