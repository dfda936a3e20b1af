"""Time of a command and the most resident memory that its process had, mapped files counted in; JSON in the last line.

python -m benchmarks.size.watched COMMAND …
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_EVERY_S = 0.02


def watch(command: Sequence[str]) -> dict[str, float]:
    """Run a command to its end, what it prints going to standard error; raises ``CalledProcessError``."""
    begun = time.perf_counter()
    peak = 0
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        while process.poll() is None:
            peak = max(peak, _peak_bytes(process.pid))
            time.sleep(_EVERY_S)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"seconds": seconds, "peak_bytes": peak}


def _peak_bytes(pid: int) -> int:
    """The high-water mark of a process; 0 where it is ending or the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    try:
        print(json.dumps(watch(sys.argv[1:])))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode if error.returncode > 0 else 1)
