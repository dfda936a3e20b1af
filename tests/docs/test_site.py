"""The documentation site: strict, whole, offline, and every public name is in it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import REPOSITORY

PACKAGES = ("adalink.training", "adalink.export", "adalink.runtime")
FETCHED = re.compile(r'<(?:script|img|iframe|source)[^>]*\ssrc="(https?:)?//|<link[^>]*\shref="(https?:)?//')

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: `make docs` installs it"
)


def load_hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", REPOSITORY / "docs/site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    built = build(REPOSITORY, out)
    assert built.returncode == 0, built.stderr
    return out


@needs_mkdocs
def test_site_pages_fetch_nothing_from_the_network(site):
    for page in site.rglob("*.html"):
        assert FETCHED.search(page.read_text(encoding="utf-8")) is None, page


def test_fetched_pattern_finds_a_remote_script():
    assert FETCHED.search('<script async src="https://unpkg.com/x.js"></script>')
    assert FETCHED.search('<link rel="stylesheet" href="//fonts.googleapis.com/css">')
    assert not FETCHED.search('<a href="https://arxiv.org/abs/2310.12100">')


@needs_mkdocs
def test_site_documents_every_public_name(site):
    page = (site / "reference/python-api.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'id="(adalink\.[\w.]+)"', page))
    for package in PACKAGES:
        names = {name for name in importlib.import_module(package).__all__ if not name.endswith("Error")}
        assert names
        assert {f"{package}.{name}" for name in names} <= anchors


@needs_mkdocs
def test_site_shows_docstring_sections(site):
    page = (site / "reference/python-api.html").read_text(encoding="utf-8")
    for title in ("Parameters:", "Returns:", "Raises:", "Attributes:"):
        assert title in page
    assert "Args:" not in page, "a docstring is not in the Google style"


@needs_mkdocs
@pytest.mark.parametrize(
    "faults",
    [
        {
            "docs/benchmarks.md": "[gone](../benchmarks/GONE.md)",
            "docs/concepts/file-formats.md": "[gone](parity.md#no-such-heading)",
            "docs/unlisted.md": "# A page that is not in the navigation",
        },
        {"docs/reference/python-api.md": "::: adalink.runtime.NoSuchName"},
    ],
    ids=["pages", "names"],
)
def test_site_build_with_planted_faults_fails(tmp_path, faults):
    for name in ("src", "runtime", "training", "export", "tools", "benchmarks", "examples", "studies"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    for page, fault in faults.items():
        with (tmp_path / page).open("a", encoding="utf-8") as file:
            file.write(f"\n{fault}\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    for page, fault in faults.items():
        assert (re.findall(r"GONE\.md|no-such-heading|NoSuchName", fault) or [Path(page).name])[0] in built.stderr


def test_hooks_rewrite_links_between_docs_and_repository(tmp_path):
    hooks = load_hooks()
    for name in ("docs/concepts/parity.md", "benchmarks/README.md", "benchmarks/cpu.json", "CONTRIBUTING.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def rewritten(source: str, text: str) -> str:
        return hooks.rewrite_links(text, tmp_path / source, tmp_path)

    page = "docs/concepts/parity.md"
    assert rewritten(page, "[b](../../benchmarks/README.md#how)") == "[b](../repository/benchmarks/README.md#how)"
    assert rewritten(page, "[b](../../benchmarks/cpu.json)") == "[b](../repository/benchmarks/cpu.json)"
    assert rewritten("benchmarks/README.md", "[p](../docs/concepts/parity.md)") == "[p](../../concepts/parity.md)"
    assert rewritten("CONTRIBUTING.md", "[b](benchmarks)") == "[b](benchmarks/README.md)"
    for kept in ("[gone](../../gone.md)", "[web](https://arxiv.org)", "[here](#levels)", "[out](../../../etc)"):
        assert rewritten(page, kept) == kept
