"""The wheel holds every module of the five folders and the files of its pages, and nothing else."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from helpers.paths import REPOSITORY

PACKAGES = ("training", "export", "runtime", "serving", "tools")
PAGES = {
    "serving/endpoints/page": ("icon.svg", "index.html", "page.css", "page.js"),
    "export/web/page": ("adalink.mjs", "index.html", "page.css", "page.mjs", "worker.mjs"),
}


def test_the_wheel_holds_what_the_tree_holds(tmp_path: Path) -> None:
    # Built from a copy: a build folder in the checkout would bring back modules that are no longer there.
    source = tmp_path / "source"
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "src", source / "src", symlinks=True)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    expected = {
        f"adalink/{path.relative_to(REPOSITORY).as_posix()}"
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.suffix in (".py", ".typed") and "__pycache__" not in path.parts
    }
    expected |= {f"adalink/{folder}/{name}" for folder, names in PAGES.items() for name in names}
    assert packed == expected
    assert any(name.endswith("entry_points.txt") for name in names)


def test_no_package_init_holds_logic() -> None:
    """A docstring, imports, ``__all__``, and names that are imported when they are used."""
    for package in PACKAGES:
        tree = ast.parse((REPOSITORY / package / "__init__.py").read_text())
        foreign = [ast.unparse(node) for node in tree.body[1:] if not is_declaration(node)]
        assert foreign == [], f"{package}/__init__.py"


def is_declaration(node: ast.stmt) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING" and all(map(is_declaration, (*node.body, *node.orelse)))
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) in ("__all__", "(__getattr__, __dir__)")
    return isinstance(node, ast.ImportFrom)
