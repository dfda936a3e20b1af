"""A worker process: answers ``KIND SEED`` lines with one JSON line each, and may crash or hang while it does."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

_MEMORY_BYTES = 16 << 30


def main(corpus: str, work: str) -> None:
    """Serve until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print there
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.RLIM_INFINITY))
    from fuzz.kinds import KINDS, generator_of
    from fuzz.outcomes import Outcome, describe

    from adalink.tools.terminal.quiet import quiet_libraries

    kinds = {}
    with quiet_libraries():
        for line in sys.stdin:
            name, seed = line.split()
            begun = time.perf_counter()
            try:
                if name not in kinds:
                    kinds[name] = KINDS[name](Path(corpus), Path(work))
                outcome = kinds[name].use(kinds[name].make(generator_of(name, int(seed))))
            except Exception as error:  # of the harness itself: it must not look like an answer of the kit
                outcome = Outcome("harness", describe(error))
            seconds = time.perf_counter() - begun
            answers.write(json.dumps([outcome.kind, outcome.detail, seconds]) + "\n")
            answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
