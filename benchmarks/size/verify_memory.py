"""Memory and time of ``adalink verify``: ``python -m benchmarks.size.verify_memory WORK --size 0.5b --quantize int4``.

A seeded checkpoint in bfloat16 is written, exported and verified, each in a process of its own, and deleted. With
``--record FILE`` the result is added to a JSON file; ``--plot FILE PNG`` draws such a file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.size.export_memory import measure as measure_export
from benchmarks.size.seeded_model import SIZES, parameters_of, write_model

_CHILD = """
import json, sys, threading, time
from pathlib import Path
from adalink.tools.parity.suite import VerifyOptions, verify

def memory(field, process="self"):
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
    except (OSError, StopIteration):  # it has ended
        return 0

def fresh_processes():
    return [child for tasks in Path("/proc/self/task").glob("*/children") for child in tasks.read_text().split()]

peaks, is_running = {"all": 0, "RssAnon": 0, "fresh": 0}, True

def watch():
    while is_running:
        fresh = sum(memory("VmRSS", child) for child in fresh_processes())
        now = {"all": memory("VmRSS") + fresh, "RssAnon": memory("RssAnon"), "fresh": fresh}
        for name, size in now.items():
            peaks[name] = max(peaks[name], size)
        time.sleep(0.05)

def progress(line):
    print(f"{memory('VmRSS') >> 20:6} MiB, at most {memory('VmHWM') >> 20:6}: {line}", file=sys.stderr, flush=True)

path, against, variant, threads = sys.argv[1:]
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
options = VerifyOptions(variant=variant, threads=int(threads) or None, quick=True)
report = verify(Path(path), against, {}, options, progress=progress)
seconds = time.perf_counter() - start
is_running = False
watcher.join()
print(json.dumps({
    "seconds": round(seconds, 1),
    "peak_bytes": max(memory("VmHWM"), peaks["all"]),
    "peak_anonymous_bytes": peaks["RssAnon"],
    "peak_of_fresh_process_bytes": peaks["fresh"],
    "checks": len(report.checks),
    "failed": [check.name for check in report.checks if not check.passed],
}))
"""


def measure(
    work: Path, size: str, quantization: str | None, tokenizer: Path | None, threads: int | None = None
) -> dict[str, Any]:
    """Verify a seeded model; peaks of the resident memory, mapped files and fresh processes counted in, and the time.

    Args:
        work: folder for checkpoint and deployment, which are deleted.
        size: one of ``SIZES``.
        quantization: such as ``"int4"``; ``None`` for float32.
        tokenizer: a ``tokenizer.json`` for the model, without which nothing is generated.
        threads: threads of the engine; all cores by default.
    """
    model, deployment = work / f"model-{size}", work / f"deployment-{size}"
    variant = quantization or "onnxruntime-cpu"
    try:
        write_model(model, size)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, model / "tokenizer.json")
        exported = measure_export(model, deployment, "float32", "onnxruntime-cpu", quantization)
        command = [sys.executable, "-c", _CHILD, str(deployment), str(model), variant, str(threads or 0)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for folder in (model, deployment):
            shutil.rmtree(folder, ignore_errors=True)
    parameters = parameters_of(size)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "size": size,
        "variant": variant,
        "parameters": parameters,
        "checkpoint_bytes": 2 * parameters,
        "graph_bytes": exported["graph_bytes"],
        **found,
        "peak_over_checkpoint": round(found["peak_bytes"] / (2 * parameters), 2),
        "peak_over_float32": round(found["peak_bytes"] / (4 * parameters), 2),
    }


def add(record: Path, result: dict[str, Any]) -> None:
    """Put a result into a file, in the place of the earlier one of the same size and variant."""
    results = json.loads(record.read_text()) if record.is_file() else []
    key = result["size"], result["variant"]
    kept = [one for one in results if (one["size"], one["variant"]) != key]
    record.write_text(
        json.dumps(sorted([*kept, result], key=lambda one: (one["variant"], one["parameters"])), indent=2)
    )


def plot(record: Path, image: Path) -> None:
    """Memory and time against the size of the checkpoint, on logarithmic axes."""
    from matplotlib import pyplot

    results = json.loads(record.read_text())
    figure, (memory, duration) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    weights = sorted({one["checkpoint_bytes"] / 1e9 for one in results})
    for factor, style, name in ((3, "--", "3 times the bfloat16 weights"), (6, ":", "3 times the float32 weights")):
        memory.plot(weights, [factor * one for one in weights], style, color="#999999", label=name)
    for variant, colour in (("onnxruntime-cpu", "#0072B2"), ("int4", "#E69F00")):
        points = [one for one in results if one["variant"] == variant]
        xs = [one["checkpoint_bytes"] / 1e9 for one in points]
        label = "float32" if variant == "onnxruntime-cpu" else variant
        memory.plot(xs, [one["peak_bytes"] / 1e9 for one in points], "o-", color=colour, label=label)
        duration.plot(xs, [one["seconds"] / 60 for one in points], "o-", color=colour, label=label)
    for axes, title in ((memory, "peak of the memory, GB"), (duration, "time, minutes")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"adalink verify --quick: {title}", fontsize=10)
        axes.set_xlabel("checkpoint in bfloat16, GB", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(image, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, nargs="?", default=Path("build/verify-memory"))
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--quantize", default=None)
    parser.add_argument("--tokenizer", type=Path, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--record", type=Path, default=None)
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("RECORD", "PNG"), default=None)
    arguments = parser.parse_args()
    if arguments.plot is not None:
        plot(*arguments.plot)
    if arguments.size is not None:
        arguments.work.mkdir(parents=True, exist_ok=True)
        result = measure(arguments.work, arguments.size, arguments.quantize, arguments.tokenizer, arguments.threads)
        if arguments.record is not None:
            add(arguments.record, result)
        print(json.dumps(result))
