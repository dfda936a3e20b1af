"""What looking embeddings up costs beside a decode step, in alternating rounds.

python -m benchmarks.lookup DEPLOYMENT [--variant int4] [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from adalink.runtime import Deployment
from adalink.runtime.storage.embedding_table import open_table

_ROUNDS, _STEPS = 9, 32


def main() -> None:
    """Print medians in microseconds, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("deployment", type=Path)
    parser.add_argument("--variant")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with Deployment.open(options.deployment, variant=options.variant, threads=options.threads) as deployment:
        base = deployment.manifest.base
        table = open_table(options.deployment / base.embeddings, base)
        ids = np.random.default_rng(0).integers(0, base.vocab_size, (_ROUNDS, 200, 1, 1))
        lookups, steps = [], []
        for of_round in ids:
            start = time.perf_counter()
            deployment.generate(["The"], max_new_tokens=_STEPS, stop=[])
            steps.append((time.perf_counter() - start) / _STEPS)
            start = time.perf_counter()
            for token in of_round:
                table.take(token)
            lookups.append((time.perf_counter() - start) / len(of_round))
    lookup, step = 1e6 * float(np.median(lookups)), 1e6 * float(np.median(steps))
    encoding = base.embedding_dtype if base.table is None else base.table.encoding
    print(f"{encoding}: {lookup:.1f} us a token, {step:.0f} us a decode step: {100 * lookup / step:.2f} %")


if __name__ == "__main__":
    main()
