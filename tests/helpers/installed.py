"""The kit as it is after ``pip install 'adalink-kit[cpu]'``: what that does not bring is not to be imported.

Modules of other packages are hidden from a process and its children, by a ``sitecustomize`` in front of the path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

from helpers.paths import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HIDE = """
import json, os, sys

HIDDEN = frozenset(json.loads(os.environ["HIDDEN_MODULES"]))


class Without:
    '''A finder that does not see hidden modules.'''

    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return self._finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
_CALL = """
import json, sys
from click.testing import CliRunner
from adalink.tools.cli import main
from adalink.tools.command_line import error_boundary

calls, known = json.load(sys.stdin)
error_boundary._EXTRAS = error_boundary._EXTRAS if known else {}
results = []
for arguments in calls:
    result = CliRunner().invoke(main, arguments)
    error = None if isinstance(result.exception, SystemExit | None) else repr(result.exception)
    results.append([result.exit_code, result.stdout, result.stderr, error])
print("RESULTS " + json.dumps(results))
"""


def modules_without(extras: Iterable[str]) -> list[str]:
    """Top-level modules that are here, and would not be with these extras alone."""
    brought = packages_of(extras)
    return sorted(
        module for module, names in packages_distributions().items() if not brought & set(map(canonicalize_name, names))
    )


def packages_of(extras: Iterable[str]) -> set[str]:
    """The kit and all packages that it brings with these extras, as far as they are installed here."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    waiting, brought = [Requirement(line) for line in lines], {str(canonicalize_name(project["name"]))}
    done = set()
    while waiting:
        requirement = waiting.pop()
        name, wanted = canonicalize_name(requirement.name), ("", *sorted(requirement.extras))
        if (name, wanted) in done or not applies(requirement, ("",)):
            continue
        done.add((name, wanted))
        brought.add(name)
        try:
            needed = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        waiting += [replace_marker(line) for line in map(Requirement, needed) if applies(line, wanted)]
    return brought


def applies(requirement: Requirement, extras: Sequence[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def replace_marker(requirement: Requirement) -> Requirement:
    """The same without its marker, which was true."""
    requirement.marker = None
    return requirement


def run_hidden(hidden: Sequence[str], folder: Path, calls: Sequence[Sequence[str]], *, known: bool = True) -> list[Any]:
    """Run commands one after another in a process without some modules.

    Args:
        hidden: names of top-level modules.
        folder: an empty folder.
        calls: arguments of each command.
        known: whether the boundary knows which extra brings which package.

    Returns:
        Exit code, output, error output, and what was raised that is no exit, of each command.
    """
    (folder / "sitecustomize.py").write_text(_HIDE)
    path = os.pathsep.join(filter(None, (str(folder), *sys.path)))
    environment = {**os.environ, "PYTHONPATH": path, "HIDDEN_MODULES": json.dumps(list(hidden)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _CALL],
        input=json.dumps([[list(map(str, call)) for call in calls], known]),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: list[Any] = json.loads(done.stdout.rpartition("RESULTS ")[2])
    return results
