"""Fresh Python processes without the seconds of their imports: each is forked from one that has only imported.

A process that is started anew takes one to five seconds to import ONNX Runtime or PyTorch. Here one such process stays,
which has imported and done nothing else, and gives a copy of itself for each program. What a test plants in its own
process does not reach the copies, as it does not reach a process that is started anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_SERVE = """
import importlib, io, json, os, runpy, sys, tempfile, traceback

for name in sys.argv[1:]:
    importlib.import_module(name)


def perform(request):
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[1:1] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder not in sys.path]
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    kind, program, *arguments = request["program"]
    sys.argv = [kind, *arguments]
    try:
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int | None) else 1
    except BaseException:
        traceback.print_exc()
        return 1


while line := sys.stdin.readline():
    request = json.loads(line)
    files = [tempfile.TemporaryFile() for _ in range(3)]
    files[0].write(request["input"].encode())
    files[0].seek(0)
    child = os.fork()
    if child == 0:
        for number, file in enumerate(files):
            os.dup2(file.fileno(), number)
        code = perform(request)
        for stream in (sys.stdout, sys.stderr):
            if not stream.closed:
                stream.flush()
        os._exit(code or 0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in files[1:]:
        file.seek(0)
        texts.append(file.read().decode())
    for file in files:
        file.close()
    print(json.dumps([code, *texts]), flush=True)
"""


class WarmPython:
    """In place of ``subprocess.run`` for Python programs. It starts with the first one; close it in the end.

    Args:
        imports: modules that are imported once.
        options: options of the interpreter; those of the programs must be the same.
    """

    def __init__(self, imports: Sequence[str], options: Sequence[str] = ()) -> None:
        self._imports = tuple(imports)
        self._start = [sys.executable, *options]
        self._server: subprocess.Popen[str] | None = None

    def run(
        self,
        command: Sequence[str],
        *,
        input: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        **_: bool,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program as ``subprocess.run(command, capture_output=True, text=True)`` does, in a forked process."""
        count = len(self._start)
        assert list(command[:count]) == self._start, command
        assert command[count] in ("-c", "-m"), command
        environment = dict(os.environ if env is None else env)
        server = self._server or self._serve(environment)
        assert server.stdin is not None
        assert server.stdout is not None
        request = {
            "program": list(command[count:]),
            "input": input,
            "environment": environment,
            "cwd": str(cwd or Path.cwd()),
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the process that gives copies of itself ended: {server.wait()}"
        code, stdout, stderr = json.loads(answer)
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    def _serve(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        self._server = subprocess.Popen(
            [*self._start, "-c", _SERVE, *self._imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        return self._server

    def close(self) -> None:
        """End the process that stays."""
        if self._server is not None:
            self._server.communicate()
            self._server = None
