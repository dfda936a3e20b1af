"""Which way imports go: the contracts of pyproject.toml are kept, find what breaks them, and no long cycle is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import REPOSITORY

grimp = pytest.importorskip("grimp", reason="import-linter, which pyproject.toml asks for from Python 3.11 on")

PACKAGES = ("runtime", "serving", "training", "export", "tools")
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
# Where an import is planted, what it says, and the contract that it breaks.
PLANTED = (
    ("runtime/errors.py", "import torch", "the runtime imports no torch, transformers, onnx or optimum"),
    ("runtime/storage/digest.py", "from adalink.runtime.engine import Backend", "inside runtime: deployment ->"),
    ("runtime/tasks/folding.py", "from adalink.runtime.text.tokenizer import Tokenizer", "inside runtime: deployment"),
    ("runtime/deployment.py", "from adalink.runtime.ort.backend import OnnxRuntimeBackend", "only backends imports"),
    ("runtime/device/pool.py", "from adalink.runtime.trt.api import Api", "inside runtime: deployment ->"),
    ("runtime/new_room.py", "x = 1", "inside runtime: deployment ->"),
    (
        "training/device.py",
        "from adalink.export.writer import open_writer",
        "tools -> {export -> training, serving} -> runtime",
    ),
    ("export/writer.py", "from adalink.training.settings import TrainSettings", "export uses of training only"),
    ("training/models/loading.py", "from adalink.training.settings import TrainSettings", "training.models stands al"),
    (
        "export/vision/tower.py",
        "from adalink.export.base.files import describe_base",
        "inside export: {genai, lora, web} ->",
    ),
    ("training/loop/checkpoints.py", "from adalink.training.search.search import search", "inside training: run ->"),
    ("serving/options.py", "from adalink.training.settings import TrainSettings", "serving uses runtime alone"),
    ("serving/metrics.py", "from adalink.serving.gateway import Gateway", "inside serving: {server, ray} -> app"),
    ("serving/new_room.py", "x = 1", "inside serving: {server, ray} -> app"),
    (
        "runtime/options.py",
        "from adalink.serving.options import ServeOptions",
        "tools -> {export -> training, serving}",
    ),
    ("tools/parity/suite.py", "from adalink.tools.bench.measure import measure", "inside tools: cli -> commands"),
)
FORMS = {
    "top": "{line}\n",
    "lazy": "def _planted() -> None:\n    {line}\n",
    "typing": "from typing import TYPE_CHECKING as _T\n\nif _T:\n    {line}\n",
}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "COLUMNS": "200"}
    command = [sys.executable, "-c", LINT, "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contracts")
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "src", folder / "src", symlinks=True)
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    return folder


def test_contracts_hold(tree: Path) -> None:
    done = lint(tree)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize(("file", "line", "contract"), PLANTED, ids=[file for file, _, _ in PLANTED])
def test_planted_import_breaks_its_contract(tree: Path, file: str, line: str, contract: str) -> None:
    path = tree / file
    before = path.read_text() if path.exists() else None
    try:
        path.write_text(f"{before or ''}\n\n{line}\n")
        done = lint(tree)
    finally:
        path.unlink()
        if before is not None:
            path.write_text(before)
    assert done.returncode == 1, done.stdout
    broken = [row for row in done.stdout.splitlines() if " BROKEN" in row]
    assert any(contract in row for row in broken), done.stdout


@pytest.mark.parametrize("form", FORMS)
def test_planted_import_is_found_in_every_form(tree: Path, form: str) -> None:
    path = tree / "runtime/errors.py"
    before = path.read_text()
    try:
        path.write_text(before + "\n\n" + FORMS[form].format(line="import torch"))
        done = lint(tree)
    finally:
        path.write_text(before)
    assert done.returncode == 1, done.stdout
    assert "adalink.runtime.errors -> torch" in done.stdout


def test_no_cycle_of_more_than_two_modules() -> None:
    """A cycle of two is a type that a module and the one it builds on share."""
    graph = grimp.build_graph(*(f"adalink.{package}" for package in PACKAGES), cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 150
    assert [sorted(cycle) for cycle in cycles(imports) if len(cycle) > 2] == []


def test_cycles_are_found() -> None:
    assert list(cycles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()})) == [{"a", "b", "c"}]


def cycles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Modules that import each other, directly or not: the strongly connected components of more than one."""
    reach = {module: reachable(module, imports) for module in imports}
    together = {module: {other for other in reach[module] if module in reach[other]} for module in imports}
    found = {frozenset(group) for group in together.values() if len(group) > 1}
    return [set(group) for group in found]


def reachable(start: str, imports: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for module in imports[waiting.pop()] - seen:
            seen.add(module)
            waiting.append(module)
    return seen


def test_backends_are_imported_when_they_are_opened() -> None:
    code = "import adalink.runtime.backends, sys; print([name for name in sys.modules if name.startswith('adalink.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "adalink.runtime.backends" in done.stdout
    for room in ("ort", "trt", "device"):
        assert f"adalink.runtime.{room}" not in done.stdout
