"""Memory and time of an export: ``python -m benchmarks.size.export_memory MODEL OUT [--quantize int4] [--target ...]``.

The export runs in a process of its own, which says how much memory it had at most. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_CHILD = """
import sys
from pathlib import Path
from adalink.export import export_base

def memory(field):
    # Of this process alone; getrusage also counts what its parent had when it was made.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

def progress(line):
    print(f"{memory('VmRSS') >> 20:6} MiB, at most {memory('VmHWM') >> 20:6}: {line}", file=sys.stderr, flush=True)

model, out, dtype, target, quantization = sys.argv[1:]
export_base(model, out, dtype=dtype, target=target, quantization=quantization or None, progress=progress)
print(memory("VmHWM"))
"""


def measure(model: Path | str, out: Path, dtype: str, target: str, quantization: str | None) -> dict[str, Any]:
    """Export a model; peak of the resident memory, mapped files counted in, and the time."""
    command = [sys.executable, "-c", _CHILD, str(model), str(out), dtype, target, quantization or ""]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    variant = out / "base" / (quantization or target)
    graph_bytes = sum(path.stat().st_size for path in variant.iterdir())
    table = out / "base/embeddings.safetensors"  # none where the table is read from the head
    table_bytes = table.stat().st_size if table.exists() else 0
    peak = int(done.stdout.split()[-1])
    return {
        "variant": quantization or target,
        "dtype": dtype,
        "seconds": round(seconds, 1),
        "peak_bytes": peak,
        "graph_bytes": graph_bytes,
        "table_bytes": table_bytes,
        "peak_over_weights": round(peak / graph_bytes, 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--target", default="onnxruntime-cpu")
    parser.add_argument("--quantize", default=None)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.model, arguments.out, arguments.dtype, arguments.target, arguments.quantize)))
