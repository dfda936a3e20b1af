"""The graphs of one variant of a base: checked, traced, quantised and fused as its target has them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adalink.export.architectures import Architecture
from adalink.export.base.activations import check_activations
from adalink.export.base.files import metadata_of
from adalink.export.base.gguf_codes import GgufCodes, describe_tensors
from adalink.export.base.quantize import SCHEMES, quantize
from adalink.export.base.request import TARGETS
from adalink.export.base.tied_head import keep_table_rows
from adalink.export.writer import DeploymentWriter
from adalink.runtime.storage.manifest import Base, Variant
from adalink.training.models.loading import embedding_matrix
from adalink.training.models.stand_ins import StandIns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adalink.export.tracing.graph_weights import WeightedGraph

# Backends that take position ids of several axes.
ONE_BACKEND = ("onnxruntime-cpu",)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BaseSource:
    """What the graphs of a variant are made of: a model, its entry in the registry, its contract and its weights."""

    model: PreTrainedModel
    architecture: Architecture
    base: Base
    stand_ins: StandIns


def write_variant(
    writer: DeploymentWriter,
    source: BaseSource,
    target: str,
    quantization: str | None,
    codes: Path | None,
    progress: Progress,
) -> Variant:
    """Write the graphs of one variant; ``codes`` is the GGUF file whose codes are kept."""
    from adalink.export.base.graphs import traced_graphs
    from adalink.export.base.grouped_attention import WINDOWS_SINCE, has_windows, why_not_grouped
    from adalink.export.base.ort_fusion import why_not_fused
    from adalink.export.tracing.attention import exportable_attention
    from adalink.export.tracing.graph import trace
    from adalink.runtime.ort.session import NEEDS_ONNXRUNTIME

    model, architecture, base = source.model, source.architecture, source.base
    folder = writer.fresh_folder(f"base/{quantization or target}")
    scheme = None if quantization is None else SCHEMES[quantization]
    gguf = None if codes is None else GgufCodes(codes)
    metadata = metadata_of(base)
    files = {}
    grouped = target == "onnxruntime-cpu" and architecture.kind == "decoder"
    if grouped and (reason := why_not_grouped(model, architecture)):
        grouped = False
        progress(f"attention is kept in standard operators: {reason}")
    if grouped and has_windows(model, architecture):
        metadata[NEEDS_ONNXRUNTIME] = WINDOWS_SINCE
    types, stand_ins = base.takes_token_types, source.stand_ins
    with exportable_attention(model):
        for graph in traced_graphs(model, architecture, grouped=False, token_types=types, stand_ins=stand_ins).values():
            check_activations(graph, base.name, base.embedding_dtype)
        graphs = traced_graphs(model, architecture, grouped=grouped, token_types=types, stand_ins=stand_ins)
        for stem, graph in graphs.items():
            progress(f"tracing {stem}.onnx ({base.embedding_dtype})")
            files[stem] = f"{folder}/{stem}.onnx"
            traced = trace(graph, f"{stem}.onnx", metadata)
            if scheme is not None:
                quantize(traced, scheme, f"{stem}.onnx", gguf)
            elif graph.is_grouped or target == "portable":
                keep_table_rows(traced, stand_ins.source(embedding_matrix(model)), is_flat=graph.is_grouped)
            _write_graph(traced, writer.stage(files[stem]), target, progress)
    if scheme is not None and gguf is not None:
        scheme = gguf.record(scheme)
        for line in describe_tensors(scheme):
            progress(line)
    if target != "portable" and (reason := why_not_fused(target)):
        progress(f"the graph is kept in standard operators: {reason}")
    return Variant(
        target=target,
        quantization=scheme,
        backends=TARGETS[target] if architecture.position_axes == 1 else ONE_BACKEND,
        graph=files["model"],
        decoder_graph=files.get("decoder"),
        files=tuple(path for name in files.values() for path in (name, f"{name}.data")),
    )


def _write_graph(traced: WeightedGraph, path: Path, target: str, progress: Progress) -> None:
    """Write a traced graph, its nodes fused as the target has them."""
    from adalink.export.base.ort_fusion import fuse, why_not_fused
    from adalink.export.tracing.graph import save_graph

    if why_not_fused(target) is not None:
        save_graph(traced, path, progress)
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".portable-") as temporary:
        portable = Path(temporary) / path.name
        save_graph(traced, portable, progress)
        progress(f"fusing {path.name} for {target}")
        fuse(portable, path, target)
