"""What keeps a project in order agrees with itself: workflows, forms, versions, pins and pages."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.paths import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from adalink.runtime.storage.manifest import READABLE_VERSIONS, SCHEMA_VERSION

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))
FORMS = sorted((REPOSITORY / ".github/ISSUE_TEMPLATE").glob("*.yml"))
PAGES = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/project/stability.md")
# Not part of the job with the oldest dependencies: tools for development, the site, what needs an NVIDIA GPU, and Ray,
# which wants a later Starlette than the server does.
NOT_OLDEST = ("dev", "docs", "gpu", "ray", "tensorrt", "tensorrt-rtx", "tensorrt-rtx-provider")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def make_targets() -> set[str]:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", text, flags=re.MULTILINE))


def steps() -> Iterator[dict[str, Any]]:
    """Every step of every job."""
    for path in WORKFLOWS:
        for job in read_yaml(path)["jobs"].values():
            yield from job["steps"]


def matrix_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
    return found


def made_commands() -> list[list[str]]:
    """Words of each call of make."""
    runs = (re.sub(r"\$\{\{.*?\}\}", "VALUE", str(step["run"])) for step in steps() if "run" in step)
    lines = chain.from_iterable(run.splitlines() for run in runs)
    return [line.split()[1:] for line in lines if line.split()[:1] == ["make"]]


def test_workflows_call_targets_that_the_makefile_has() -> None:
    called = {word for words in made_commands() for word in words if "=" not in word}
    assert called >= {"lint", "test", "docs"}
    assert called <= make_targets()


def test_workflows_pass_only_variables_that_the_makefile_reads() -> None:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    variables = set(re.findall(r"^([A-Z]+)\s*\?=", text, flags=re.MULTILINE))
    passed = {word.partition("=")[0] for words in made_commands() for word in words if "=" in word}
    assert passed <= variables


def test_workflows_name_constraint_files_that_are_there() -> None:
    named = re.findall(r"constraints[\w-]*\.txt", "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS))
    assert set(named) == {"constraints.txt", "constraints-oldest.txt"}
    assert all((REPOSITORY / name).is_file() for name in named)


def test_matrix_holds_the_python_versions_of_the_classifiers(project: dict[str, Any]) -> None:
    job = read_yaml(REPOSITORY / ".github/workflows/ci.yml")["jobs"]["test"]
    tested = {(entry["os"].partition("-")[0], entry["python"]) for entry in matrix_of(job)}
    prefix = "Programming Language :: Python :: "
    promised = {line.removeprefix(prefix) for line in project["classifiers"] if line.startswith(f"{prefix}3.")}
    assert {python for system, python in tested if system == "ubuntu"} == promised
    assert "macos" in {system for system, _ in tested}
    assert project["requires-python"] == f">={min(promised, key=lambda name: int(name.partition('.')[2]))}"


def test_steps_use_actions_at_a_version() -> None:
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in used)


def test_ci_measures_coverage_where_python_has_a_quick_tracer() -> None:
    job = read_yaml(REPOSITORY / ".github/workflows/ci.yml")["jobs"]["test"]
    measured = {(entry["os"], entry["python"]) for entry in matrix_of(job) if entry["coverage"]}
    assert measured == {("ubuntu-latest", "3.12"), ("ubuntu-latest", "3.13")}


@pytest.mark.parametrize("setting", ["0", "1"])
def test_make_test_measures_coverage_as_told(setting: str) -> None:
    command = ["make", "--dry-run", "--always-make", "test", f"COVERAGE={setting}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ("--cov --cov-report=term" in done.stdout) == (setting == "1")
    assert "--constraint constraints.txt" in done.stdout


def test_make_test_installs_unpinned_where_constraints_is_empty() -> None:
    command = ["make", "--dry-run", "--always-make", "test", "CONSTRAINTS="]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "pip install" in done.stdout
    assert "--constraint" not in done.stdout


@pytest.mark.parametrize("path", [path for path in FORMS if path.name != "config.yml"], ids=lambda path: path.stem)
def test_issue_form_is_one_that_github_takes(path: Path) -> None:
    form = read_yaml(path)
    assert set(form) == {"name", "description", "labels", "body"}
    identified = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(identified) == len(set(identified)) > 0
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert "value" in field["attributes"] if field["type"] == "markdown" else "label" in field["attributes"]


def test_pre_commit_runs_the_tools_of_make_lint() -> None:
    config = read_yaml(REPOSITORY / ".pre-commit-config.yaml")
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    lint = (REPOSITORY / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2].partition("\n\n")[0]
    for hook in hooks:
        assert f"$(RUN)/{hook['entry'].split()[0]}" in lint, hook["id"]


def floors(project: dict[str, Any]) -> dict[str, set[str]]:
    """Package -> the lowest versions that it is allowed in, with the oldest Python."""
    extras = project["optional-dependencies"]
    groups = [project["dependencies"], *(extras[name] for name in extras if name not in NOT_OLDEST)]
    found: dict[str, set[str]] = {}
    oldest = {"python_version": project["requires-python"].removeprefix(">=")}
    for requirement in map(Requirement, chain.from_iterable(groups)):
        if requirement.marker is not None and not requirement.marker.evaluate(oldest):
            continue
        lowest = {specifier.version for specifier in requirement.specifier if specifier.operator == ">="}
        assert len(lowest) == 1, f"{requirement}: give it one floor"
        found.setdefault(canonicalize_name(requirement.name), set()).update(lowest)
    return found


def test_oldest_constraints_pin_every_dependency_to_its_floor(project: dict[str, Any]) -> None:
    lines = (REPOSITORY / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pins, exempt = {}, set()
    for line in lines:
        if match := re.fullmatch(r"# ([\w-]+): .+", line):  # a floor that something else does not allow here
            exempt.add(match[1])
        elif line and not line.startswith("#"):
            (specifier,) = Requirement(line).specifier
            assert specifier.operator == "=="
            pins[canonicalize_name(Requirement(line).name)] = {specifier.version}
    assert exempt == {"safetensors", "tokenizers"}
    assert pins == {name: lowest for name, lowest in floors(project).items() if name not in exempt}


def test_version_is_the_latest_of_the_changelog_and_of_the_citation(project: dict[str, Any]) -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", changelog, flags=re.MULTILINE)
    citation = read_yaml(REPOSITORY / "CITATION.cff")
    assert released[0] == (project["version"], str(citation["date-released"]))
    assert citation["version"] == project["version"]
    assert [version for version, _ in released][-1] == "0.1.0"
    assert re.search(r"^## \[Unreleased\]$", changelog, flags=re.MULTILINE)


def test_citation_names_title_license_and_the_paper(project: dict[str, Any]) -> None:
    citation = read_yaml(REPOSITORY / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == project["license"]
    (paper,) = citation["references"]
    assert paper["url"] == project["urls"]["Paper"] == "https://arxiv.org/abs/2310.12100"


def test_stability_page_gives_the_versions_that_the_code_has(project: dict[str, Any]) -> None:
    page = (REPOSITORY / "docs/project/stability.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `manifest.json`"))
    assert [cell.strip() for cell in row.split("|")[3:5]] == [
        str(SCHEMA_VERSION),
        ", ".join(map(str, READABLE_VERSIONS)),
    ]
    lowest = floors(project)
    for label, package in (("ONNX Runtime", "onnxruntime"), ("PyTorch", "torch"), ("transformers", "transformers")):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {label}") and "TensorRT" not in line]
        assert row.split("|")[2].split()[0] in lowest[package]


@pytest.mark.parametrize("name", PAGES)
def test_page_has_no_long_lines(name: str) -> None:
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    released = lines.index("## [0.1.0] - 2026-11-23") if name == "CHANGELOG.md" else len(lines)
    assert [line for line in lines[:released] if len(line) > 120 and not line.startswith("|")] == []
