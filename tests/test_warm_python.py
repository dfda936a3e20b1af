"""A forked process is as a fresh one: what one program does, or a test, does not reach the next."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.warm_python import WarmPython

TOLD = """
import json, os, sys
import colorsys
told = {"name": __name__, "arguments": sys.argv[1:], "folder": os.getcwd(), "word": os.environ.get("WORD")}
print(json.dumps(told | {"input": sys.stdin.read(), "is planted": hasattr(colorsys, "planted")}))
print("aside", file=sys.stderr)
colorsys.planted, os.environ["WORD"] = True, "planted"
"""


@pytest.fixture(scope="module")
def python() -> Iterator[WarmPython]:
    python = WarmPython(("colorsys",))
    yield python
    python.close()


def run(python: WarmPython, code: str) -> tuple[int, str, str]:
    done = python.run([sys.executable, "-c", code])
    return done.returncode, done.stdout, done.stderr


def test_program_has_what_it_was_given_and_nothing_of_another(
    python: WarmPython, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colorsys.planted", True, raising=False)
    for word in ("first", "second"):
        environment = os.environ | {"WORD": word}
        done = python.run([sys.executable, "-c", TOLD, "a b"], input="given", env=environment, cwd=tmp_path)
        told = {"name": "__main__", "arguments": ["a b"], "folder": str(tmp_path), "word": word}
        assert json.loads(done.stdout) == told | {"input": "given", "is planted": False}
        assert (done.returncode, done.stderr) == (0, "aside\n")


def test_ends_are_told_as_those_of_a_process(python: WarmPython) -> None:
    assert run(python, "import sys; sys.exit(3)") == (3, "", "")
    assert run(python, "import sys; print(1); sys.exit('refused')") == (1, "1\n", "refused\n")
    assert run(python, "import os; os.kill(os.getpid(), 9)") == (-9, "", "")
    code, _, error = run(python, "{}['x']")
    assert (code, error.splitlines()[-1]) == (1, "KeyError: 'x'")
    assert run(python, "print('goes on')") == (0, "goes on\n", "")


def test_modules_run_as_with_python_m(python: WarmPython) -> None:
    done = python.run([sys.executable, "-m", "json.tool", "--compact"], input='{"a": [1]}')
    assert (done.returncode, done.stdout) == (0, '{"a":[1]}\n')
