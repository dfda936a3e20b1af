"""``python -m examples.classifiers.memory DIR...``: resident memory with these deployments open, as JSON."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

from adalink.runtime import Deployment

_TEXT = "a text of some ten words that says nothing in particular"
_ROWS = 16


def main() -> None:
    """Open the deployments, classify a text under each of their tasks, and print the memory."""
    with ExitStack() as stack:
        opened = [stack.enter_context(Deployment.open(path, threads=1)) for path in sys.argv[1:]]
        for deployment in opened:
            tasks = deployment.tasks
            for start in range(0, len(tasks), _ROWS):
                some = list(tasks[start : start + _ROWS])
                deployment.classify([_TEXT] * len(some), some)
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(json.dumps({"resident_bytes": int(fields["VmRSS"].split()[0]) * 1024}))


if __name__ == "__main__":
    main()
