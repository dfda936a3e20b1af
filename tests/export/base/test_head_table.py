"""One copy of a tied table: rows that are read from the codes of the head, against PyTorch's embedding module."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runtime import reseal
from helpers.tied_codes import WIDTH, tied
from helpers.tiny_models import VOCAB_SIZE

from adalink.export.base.export import export_base
from adalink.export.writer import remove_variant
from adalink.runtime import Deployment
from adalink.runtime.errors import IntegrityError
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.table_schema import CODES
from adalink.tools.commands.inspect import describe_deployment
from adalink.tools.parity.check_adapter import check_table
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


def test_the_table_stays_when_the_variant_goes(shared: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = shared
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    export_base(model, copied)
    assert looked_up(copied, variant="onnxruntime-cpu").tobytes() == rows_of(model).tobytes()
    remove_variant(copied, "int8")
    left = describe_deployment(copied)["base"]["embedding_table"]
    assert left["size_bytes"] == (copied / left["file"]).stat().st_size
    export_base(model, copied, quantization="int8")
    assert looked_up(copied, variant="int8").tobytes() == looked_up(copied, variant="onnxruntime-cpu").tobytes()
    assert looked_up(copied).tobytes() == rows_of(model).tobytes()


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
