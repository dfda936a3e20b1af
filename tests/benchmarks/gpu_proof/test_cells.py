"""Configurations of a study as rows of one batch: each learns what it learns alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu_proof.bases import SHAPES, write_base
from benchmarks.gpu_proof.steps import cells
from benchmarks.gpu_proof.steps.cells import Cell, study_cells, train_cells

CELLS = [Cell("a", 4, "identity", 1e-2), Cell("b", 16, "gelu", 3e-3), Cell("c", 8, "identity", 3e-2)]
STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_base(tmp_path_factory.mktemp("bases") / "tiny", SHAPES["tiny"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model.requires_grad_(False)


def rows() -> torch.Tensor:
    return torch.randint(3, SHAPES["tiny"].vocabulary, (len(CELLS), 2, 12), generator=torch.Generator().manual_seed(1))


def test_each_learns_what_it_learns_alone(base: Any) -> None:
    together, _ = train_cells(base, CELLS, range(len(CELLS)), rows(), STEPS)
    start, _ = train_cells(base, CELLS, range(len(CELLS)), rows(), 1 - cells._WARM)
    for index, cell in enumerate(CELLS):
        alone, _ = train_cells(base, [cell], [index], rows()[index : index + 1], STEPS)
        assert together[index] == pytest.approx(alone[0], rel=1e-5)
        assert together[index] < start[index]


def test_a_rate_that_is_anothers_is_noticed(base: Any) -> None:
    """Planted: all configurations at the first one's rate."""
    right, _ = train_cells(base, CELLS, range(len(CELLS)), rows(), STEPS)
    wrong = [Cell(cell.name, cell.rank, cell.activation, CELLS[0].lr) for cell in CELLS]
    found, _ = train_cells(base, wrong, range(len(CELLS)), rows(), STEPS)
    assert found[0] == pytest.approx(right[0], rel=1e-5)
    assert all(abs(found[index] - right[index]) > 1e-3 for index in (1, 2))


def test_the_cells_are_those_of_the_full_study() -> None:
    found = study_cells()
    assert len(found) == len(set(found)) > 30
    assert {cell.rank for cell in found} == {4, 16, 64, 256}
    assert {cell.activation for cell in found} == {"identity", "gelu"}
    assert (cells.REPOSITORY / "studies" / "files" / "full.toml") == cells._STUDY
    assert Path(cells._STUDY).is_file()
