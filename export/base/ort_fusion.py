"""Graph fusion: ONNX Runtime's own optimizer, run once at export instead of at every start.

Fusions up to the "extended" level hold for any machine with the same provider. The level above, layouts for one
processor, is left to the session that runs the graph.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from adalink.runtime.errors import GraphError

PROVIDERS = {"onnxruntime-cpu": "CPUExecutionProvider", "onnxruntime-cuda": "CUDAExecutionProvider"}
_EXTERNAL_FROM_BYTES = "1024"


def why_not_fused(target: str) -> str | None:
    """Why ``target`` keeps the portable graph; ``None`` where it can be fused here."""
    import onnxruntime as ort

    if target == "portable":
        return "portable means standard operators"
    if PROVIDERS[target] not in ort.get_available_providers():
        return f"{PROVIDERS[target]} is not on this machine, so its fusions cannot be chosen; sessions fuse at load"
    return None


def fuse(portable: Path, fused: Path, target: str) -> None:
    """Write the graph ``portable`` as ``fused``, with its weights in ``<fused>.data``.

    Args:
        portable: a graph of standard operators, with its weights in ``<portable>.data``.
        fused: file to write, new, in another folder.
        target: a target for which ``why_not_fused`` returns ``None``.

    Raises:
        OSError: the disk is too full.
        GraphError: ONNX Runtime refused the graph.
    """
    import onnxruntime as ort

    from adalink.runtime.ort.errors import onnxruntime_errors

    _check_disk_space(fused, 2 * portable.stat().st_size + portable.with_name(f"{portable.name}.data").stat().st_size)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(fused)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{fused.name}.data")
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", _EXTERNAL_FROM_BYTES
    )
    reload_options = ort.SessionOptions()
    reload_options.log_severity_level = 3
    reload_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(str(portable), options, providers=[PROVIDERS[target]])
        ort.InferenceSession(str(fused), reload_options, providers=[PROVIDERS[target]])  # the file is complete
    except onnxruntime_errors(ort) as error:
        raise GraphError(
            f"{fused.name}: ONNX Runtime cannot write the graph in its fused form: {error}. Export it with --target "
            "portable, which runs on the same backends"
        ) from error


def _check_disk_space(beside: Path, size_bytes: int) -> None:
    """Raise ``OSError`` if the disk is too full: ONNX Runtime does not report that itself."""
    if shutil.disk_usage(beside.parent).free < size_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(beside))
