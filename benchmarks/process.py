"""One measurement in a process of its own; whatever goes wrong there comes back as a reason."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


class MeasurementError(Exception):
    """A process did not deliver; the message is the reason, for the report."""


def run_json(command: Sequence[str | Path], timeout_s: float, log: Path) -> dict[str, object]:
    """Run a command in the repository and read the JSON object in its last line.

    Args:
        command: program and arguments.
        timeout_s: when it is given up.
        log: gets everything else that it prints.

    Raises:
        MeasurementError: it is not there, fails, takes too long or prints no JSON object.
    """
    output = run(command, timeout_s, log).strip().splitlines()
    try:
        result = json.loads(output[-1])
    except (IndexError, ValueError):
        raise MeasurementError(f"printed no JSON object; see {log}") from None
    if not isinstance(result, dict):
        raise MeasurementError(f"printed {type(result).__name__}, expected a JSON object")
    return result


def run(command: Sequence[str | Path], timeout_s: float, log: Path) -> str:
    """Run a command in the repository; its standard output. Raises ``MeasurementError``."""
    words = [str(word) for word in command]
    # Two thread pools in one process would compete; each script sets its engine's threads.
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        try:
            done = subprocess.run(
                words,
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError:
            raise MeasurementError(f"{words[0]} is not installed; run 'make bench', which makes it") from None
        except subprocess.TimeoutExpired:
            raise MeasurementError(f"gave no answer in {timeout_s:.0f} s") from None
    if done.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        reason = lines[-1][:300] if lines else "no message"
        raise MeasurementError(f"ended with code {done.returncode}: {reason}")
    return done.stdout
