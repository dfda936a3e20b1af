"""The kit without a server: one closed batch of 16 prompts and tasks, as ``Deployment.generate`` runs it."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from adalink.runtime import Deployment


def main() -> None:
    """Print tokens/s of the fastest of three runs as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("deployment", type=Path)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--requests", type=Path, required=True, help="JSON: a list of bodies with prompt and model")
    parser.add_argument("--new-tokens", type=int, required=True)
    options = parser.parse_args()
    bodies = json.loads(options.requests.read_text(encoding="utf-8"))
    prompts, tasks = [body["prompt"] for body in bodies], [body["model"] for body in bodies]
    with Deployment.open(options.deployment, variant=options.variant) as deployment:
        deployment.generate(prompts, tasks=tasks, max_new_tokens=2)
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            deployment.generate(prompts, tasks=tasks, max_new_tokens=options.new_tokens)
            seconds.append(time.perf_counter() - begun)
    print(json.dumps({"tok_s": len(prompts) * options.new_tokens / min(seconds)}))


if __name__ == "__main__":
    main()
