"""How long a program waits before its first answer: importing the runtime, opening a deployment."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import BackendUnavailableError
from adalink.runtime.extras import install_command
from adalink.tools.common.child_process import child_environment, python_command

_IMPORT_CODE = """
import time
import numpy, onnxruntime
start = time.perf_counter()
from adalink.runtime import Deployment
print(time.perf_counter() - start)
"""


def import_seconds(repeats: int) -> float:
    """Median time of importing ``Deployment`` beyond numpy and onnxruntime, in fresh processes, in seconds."""
    command, environment = python_command(code=_IMPORT_CODE), child_environment()
    times = [
        float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout) for _ in range(repeats)
    ]
    return statistics.median(times)


def open_seconds(path: Path, threads: int | None, repeats: int, variant: str | None = None) -> tuple[float, float]:
    """Median times of opening a deployment and of creating bare ONNX Runtime sessions of its base, in turns.

    Args:
        path: the deployment; its files have been checked before, as on every start but the first.
        threads: threads of both.
        repeats: how often.
        variant: form of the base; see ``Deployment.open``.

    Returns:
        Seconds of the deployment and of the sessions.

    Raises:
        BackendUnavailableError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailableError(f"a bare session needs ONNX Runtime: {install_command('cpu')}") from error

    with Deployment.open(path, variant=variant, threads=threads) as opened:
        graphs = [name for name in (opened.variant.graph, opened.variant.decoder_graph) if name]

    def bare() -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        for graph in graphs:
            onnxruntime.InferenceSession(str(path / graph), options, providers=["CPUExecutionProvider"])

    def deployment() -> None:
        Deployment.open(path, variant=variant, threads=threads).close()

    sides: tuple[Callable[[], None], ...] = (deployment, bare)
    samples: tuple[list[float], list[float]] = ([], [])
    for turn in range(-1, repeats):
        for side, times in zip(sides, samples, strict=True):
            start = time.perf_counter()
            side()
            if turn >= 0:
                times.append(time.perf_counter() - start)
    return statistics.median(samples[0]), statistics.median(samples[1])


def measure_startup(path: Path, threads: int | None, variant: str | None = None) -> list[dict[str, object]]:
    """The metrics ``open_ratio`` and ``import_ms``, as ``adalink bench`` reports them."""
    opened, bare = open_seconds(path, threads, 5, variant)
    return [
        {"name": "open_ratio", "value": opened / bare, "unit": "1"},
        {"name": "import_ms", "value": 1e3 * import_seconds(repeats=7), "unit": "ms"},
    ]
