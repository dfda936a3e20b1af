"""The fused form of a base graph: ONNX Runtime's own optimizer, run once at export instead of at every start.

Its fusions up to the "extended" level hold for any machine of the same provider; the level above, layouts for one
processor, is left to the session that runs the graph.
"""

from __future__ import annotations

from pathlib import Path

PROVIDERS = {"onnxruntime-cpu": "CPUExecutionProvider", "onnxruntime-cuda": "CUDAExecutionProvider"}
_EXTERNAL_FROM_BYTES = "1024"


def why_not_fused(target: str, dtype: str) -> str | None:
    """Why the portable graph is kept for ``target``, or ``None`` when it can be fused here."""
    import onnxruntime as ort

    if target == "portable":
        return "portable means standard operators"
    if target == "onnxruntime-cpu" and dtype != "float32":
        return f"on the CPU ONNX Runtime computes {dtype} in float32, and fusing would store the weights twice as large"
    if PROVIDERS[target] not in ort.get_available_providers():
        return f"{PROVIDERS[target]} is not on this machine, so its fusions cannot be chosen; sessions fuse at load"
    return None


def fuse(portable: Path, fused: Path, target: str) -> None:
    """Write the graph ``portable`` as ``fused``, with its weights in ``<fused>.data``.

    Args:
        portable: a graph of standard operators.
        fused: file to write, new, in another folder.
        target: a target that ``why_not_fused`` has no objection to.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(fused)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{fused.name}.data")
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", _EXTERNAL_FROM_BYTES
    )
    ort.InferenceSession(str(portable), options, providers=[PROVIDERS[target]])
