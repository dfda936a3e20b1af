"""One process with a limit: it and all that it started are ended, and the ends of its output are kept."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TAIL_CHARACTERS = 4000
_POLL_SECONDS = 0.1
# At SIGABRT, Python's faulthandler writes where each thread is; then the process is ended.
_ABORT_SECONDS, _KILL_SECONDS = 3.0, 10.0


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code, negative for a signal; ``None`` if it was ended at its limit.
        seconds: how long it ran.
        stdout: the end of its output.
        stderr: the end of its errors.
    """

    code: int | None
    seconds: float
    stdout: str
    stderr: str


def run_limited(
    command: Sequence[str],
    limit_s: float,
    environment: Mapping[str, str],
    logs: Path,
    at_work: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a command as leader of a process group of its own.

    Args:
        command: program and arguments.
        limit_s: when it is ended.
        environment: its environment.
        logs: path of its logs, without ``.stdout`` and ``.stderr``.
        at_work: called ten times a second.
    """
    logs.parent.mkdir(parents=True, exist_ok=True)
    paths = [logs.with_name(f"{logs.name}.{stream}") for stream in ("stdout", "stderr")]
    begun, code = time.monotonic(), None
    with paths[0].open("wb") as stdout, paths[1].open("wb") as stderr:
        process = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            while code is None and time.monotonic() - begun < limit_s:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(_POLL_SECONDS)
                at_work()
        finally:
            seconds = time.monotonic() - begun
            if code is None:
                _signal(process, signal.SIGABRT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_ABORT_SECONDS)
            _signal(process, signal.SIGKILL)  # what it left running goes too
            with suppress(subprocess.TimeoutExpired):  # one that a driver holds cannot even be killed
                process.wait(_KILL_SECONDS)
    return Ended(code, seconds, *(_tail(path) for path in paths))


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _tail(path: Path) -> str:
    text = path.read_bytes()[-4 * _TAIL_CHARACTERS :].decode("utf-8", "replace")
    return text[-_TAIL_CHARACTERS:]


def last_line(text: str) -> str:
    """The last line with anything in it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def abort_line(stderr: str) -> str:
    """Where the main thread was, by faulthandler's report; empty without one."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip().startswith('File "')]
    return lines[0] if lines else ""
