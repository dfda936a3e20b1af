"""Paths and modules that documentation names exist, and the page of rooms names every folder."""

from __future__ import annotations

import re

import pytest
from helpers.paths import REPOSITORY

FOLDERS = ("runtime", "serving", "training", "export", "tools")
ROOMS = "docs/concepts/how-it-works.md"
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/README.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
TOP = "benchmarks|docs|examples|export|runtime|serving|src|studies|tests|tools|training"
PATH = re.compile(rf"`((?:{TOP})/[\w./-]*)`")
MODULE = re.compile(r"`(adalink\.(?!py`)[a-z_0-9]+(?:\.[a-z_0-9]+)*)")
PAGE = re.compile(r"(?<![\w/.-])(docs/[\w/-]+\.md)")
SOURCES = [path for folder in (*FOLDERS, "benchmarks", "studies") for path in (REPOSITORY / folder).rglob("*.py")]


def missing_paths(text):
    """Paths and modules in code spans of a page that are not in the checkout."""
    paths = [path for path in PATH.findall(text) if not (REPOSITORY / path).exists()]
    return paths + [name for name in MODULE.findall(text) if not is_there(name)]


def is_there(name):
    """Whether a dotted name is a module, or one of a module's names."""
    return is_module(name) or is_module(name.rpartition(".")[0])


def is_module(name):
    path = REPOSITORY.joinpath("src", *name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def table_files(text):
    """The files in the tables of a page whose headings are folders."""
    folder, files = "", []
    for line in text.splitlines():
        if line.startswith("### "):
            folder = line[4:]
        elif folder and line.startswith("| `"):
            files += [f"{folder}/{name}" for name in re.findall(r"`([\w.]+\.py)`", line.split("|")[1])]
    return files


def rooms_on_disk():
    paths = (path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))
    return {str(path.parent.relative_to(REPOSITORY)) for path in paths}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_paths_that_pages_name_exist(page):
    assert missing_paths(page.read_text(encoding="utf-8")) == []


def test_missing_paths_are_found():
    text = "`runtime/tasks/registry.py`, `runtime/bank.py`, `adalink.runtime.errors`, `adalink.gone.bank`, `docs/gone/`"
    assert missing_paths(text) == ["runtime/bank.py", "docs/gone/", "adalink.gone.bank"]


def test_rooms_page_names_files_that_exist():
    files = table_files((REPOSITORY / ROOMS).read_text(encoding="utf-8"))
    assert len(files) > 80
    assert [path for path in files if not (REPOSITORY / path).is_file()] == []
    assert table_files("### runtime/tasks\n\n| `registry.py`, `gone.py` | text |\n")[1] == "runtime/tasks/gone.py"


def test_rooms_page_names_every_folder():
    headings = set(re.findall(r"^### (\S+)$", (REPOSITORY / ROOMS).read_text(encoding="utf-8"), re.MULTILINE))
    assert headings == rooms_on_disk()


@pytest.mark.parametrize(
    ("term", "path"),
    [
        ("KV cache", "runtime/ort/static_cache.py"),
        ("adapter registry", "runtime/tasks/registry.py"),
        ("speculative decoding", "runtime/generation/speculative_decoding.py"),
        ("ONNX Runtime boundary", "runtime/ort/errors.py"),
        ("TensorRT builder", "export/engine/tensorrt_builder.py"),
        ("parity checks", "tools/parity/suite.py"),
    ],
)
def test_rooms_page_says_where_a_term_lives(term, path):
    rows = [
        line for line in (REPOSITORY / ROOMS).read_text(encoding="utf-8").splitlines() if line.startswith(f"| {term}")
    ]
    assert any(path in row for row in rows)


def test_pages_that_sources_name_exist():
    named = {(page, path) for path in SOURCES for page in PAGE.findall(path.read_text(encoding="utf-8"))}
    assert named
    gone = sorted(
        f"{path.relative_to(REPOSITORY)}: {page}" for page, path in named if not (REPOSITORY / page).is_file()
    )
    assert gone == []
