"""One fault in a copy of the kit's source, and whether its test fails then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from helpers.paths import REPOSITORY

_COPIED = ("runtime", "export", "training", "tools", "studies", "src", "tests", "pyproject.toml")


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        name: of the fault.
        path: the source file.
        old: text that stands in it once.
        new: what it becomes.
        test: the test that must fail, as pytest takes it.
    """

    name: str
    path: str
    old: str
    new: str
    test: str


def is_caught(mutant: Mutant) -> tuple[bool, str]:
    """Whether the test fails on a copy with the fault, and what it said; the copy is removed."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        root = Path(folder)
        for name in _COPIED:
            if (REPOSITORY / name).is_dir():
                skipped = shutil.ignore_patterns("__pycache__", "results")
                shutil.copytree(REPOSITORY / name, root / name, symlinks=True, ignore=skipped)
            else:
                shutil.copy(REPOSITORY / name, root / name)
        path = root / mutant.path
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            raise ValueError(f"{mutant.path} does not hold the text of the fault {mutant.name!r} once")
        path.write_text(text.replace(mutant.old, mutant.new, 1), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", mutant.test],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    return done.returncode == 1 and "FAILED" in done.stdout, done.stdout + done.stderr
