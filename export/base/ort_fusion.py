"""Graph fusion: ONNX Runtime's own optimizer, run once at export instead of at every start.

Fusions up to the "extended" level hold for any machine with the same provider. The level above, layouts for one
processor, is left to the session that runs the graph.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink.export.tracing.external_data import DataFile, data_path, is_external, place_of, read_bytes
from adalink.runtime.errors import GraphError

if TYPE_CHECKING:
    import onnx

PROVIDERS = {"onnxruntime-cpu": "CPUExecutionProvider", "onnxruntime-cuda": "CUDAExecutionProvider"}
# A graph's own bytes, where ONNX Runtime puts weights that it computes, are no more.
_MOST_COMPUTED_BYTES = 2 << 30
# Share of a file that may be of weights which the fused graph no longer has.
_MOST_UNUSED = 0.001
_ALIGNMENT_BYTES = 4096


def why_not_fused(target: str) -> str | None:
    """Why ``target`` keeps the portable graph; ``None`` where it can be fused here."""
    import onnxruntime as ort

    if target == "portable":
        return "portable means standard operators"
    if PROVIDERS[target] not in ort.get_available_providers():
        return f"{PROVIDERS[target]} is not on this machine, so its fusions cannot be chosen; sessions fuse at load"
    return None


def fuse(portable: Path, fused: Path, target: str) -> None:
    """Write the graph ``portable`` as ``fused``; its weights move from ``<portable>.data`` to ``<fused>.data``.

    ONNX Runtime leaves external weights where they are, and puts those that it computes into the graph's own bytes.
    These are appended to the others.

    Args:
        portable: a graph with its weights in ``<portable>.data``; no longer usable afterwards.
        fused: file to write, new, of the same name in another folder.
        target: a target for which ``why_not_fused`` returns ``None``.

    Raises:
        OSError: the disk is too full.
        GraphError: ONNX Runtime refused the graph.
    """
    import onnx
    import onnxruntime as ort

    from adalink.runtime.ort.errors import onnxruntime_errors

    rewritten = portable.with_name(f"fused-{portable.name}")
    computed = min(data_path(portable).stat().st_size // 2, _MOST_COMPUTED_BYTES)
    _check_disk_space(fused, 4 * portable.stat().st_size + computed)
    providers = [PROVIDERS[target]]
    levels = ort.GraphOptimizationLevel
    try:
        options = _session_options(levels.ORT_ENABLE_EXTENDED)
        options.optimized_model_filepath = str(rewritten)
        ort.InferenceSession(str(portable), options, providers=providers)
        model = onnx.load(rewritten, load_external_data=False)
        _collect_weights(model, portable)
        data_path(portable).replace(data_path(fused))
        fused.write_bytes(model.SerializeToString())
        # The file is complete.
        ort.InferenceSession(str(fused), _session_options(levels.ORT_DISABLE_ALL), providers=providers)
    except onnxruntime_errors(ort) as error:
        raise GraphError(
            f"{fused.name}: ONNX Runtime cannot write the graph in its fused form: {error}. Export it with --target "
            "portable, which runs on the same backends"
        ) from error


def _session_options(level: Any) -> Any:
    """Options of a session that optimises a graph and runs nothing, so that weights stay in their file."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _collect_weights(model: onnx.ModelProto, portable: Path) -> None:
    """Let all large initializers of ``model`` lie in the file of ``portable``, and no more than these.

    Args:
        model: the fused graph, whose initializers lie there or in its own bytes.
        portable: the graph that it was made of.
    """
    path = data_path(portable)
    tensors = model.graph.initializer
    size = path.stat().st_size
    unused = size - sum(place_of(tensor)[2] for tensor in tensors if is_external(tensor))
    if unused <= size * _MOST_UNUSED + _ALIGNMENT_BYTES * len(tensors):
        with DataFile(portable) as data:
            kept = [tensor if is_external(tensor) else data.move(tensor) for tensor in tensors]
    else:
        compact = portable.with_name("compact") / portable.name
        compact.parent.mkdir()
        with DataFile(compact) as data:
            kept = [
                data.add(tensor.name, tensor.data_type, tensor.dims, read_bytes(path.parent, tensor))
                if is_external(tensor)
                else data.move(tensor)
                for tensor in tensors
            ]
        data_path(compact).replace(path)
    del tensors[:]
    tensors.extend(kept)


def _check_disk_space(beside: Path, size_bytes: int) -> None:
    """Raise ``OSError`` if the disk is too full: ONNX Runtime does not report that itself."""
    if shutil.disk_usage(beside.parent).free < size_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(beside))
