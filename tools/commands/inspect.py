"""``adalink inspect``: explain a deployment, an adapter folder, a base model, an ONNX file or a compiled engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec import to_builtins

from adalink.runtime.errors import GraphError
from adalink.tools.command_line.hub_options import hub_options
from adalink.tools.command_line.json_output import JsonOutput, json_options
from adalink.tools.command_line.next_step import say_next
from adalink.tools.command_line.shell_completion import complete_files
from adalink.tools.command_line.verb import Verb
from adalink.tools.terminal.terminal_text import echo

if TYPE_CHECKING:
    import onnx

    from adalink.runtime.storage.manifest import Base, Manifest, Task, Vision
    from adalink.training.models.hub_access import HubAccess

Description = dict[str, object]


def describe(target: str) -> Description:
    """Find out what ``target`` is and describe it.

    Args:
        target: a deployment or adapter folder, an ONNX file, a plan, or a base model (folder, GGUF file or hub id).

    Returns:
        ``{"kind": "deployment" | "adapter" | "onnx" | "plan" | "model", ...}``, ready for JSON.

    Raises:
        AdaLinkError: it is damaged, or none of these.
    """
    path = Path(target).expanduser()
    if (path / "manifest.json").is_file():
        return describe_deployment(path)
    if (path / "adapter_config.json").is_file():
        return describe_adapter(path)
    if path.suffix == ".onnx":
        return describe_onnx(path)
    if path.suffix == ".plan":
        from adalink.tools.commands.inspect_engine import describe_plan

        return describe_plan(path)
    return describe_model(target)


def describe_deployment(folder: Path) -> Description:
    """Describe a deployment, after comparing every file with its digest; raises ``DeploymentError``."""
    from adalink.runtime.storage.integrity import verify_files
    from adalink.runtime.storage.manifest_io import read_manifest
    from adalink.runtime.storage.tokenizer_digest import deployed_tokenizer_digest
    from adalink.tools.commands.inspect_engine import describe_engine

    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    base = manifest.base

    return {
        "kind": "deployment",
        "schema_version": manifest.schema_version,
        "kit_version": manifest.kit_version,
        "base": {
            "name": base.name,
            "architecture": base.architecture,
            "kind": base.kind,
            "fingerprint": base.fingerprint,
            "vocab_size": base.vocab_size,
            "hidden_size": base.hidden_size,
            "embedding_dtype": base.embedding_dtype,
            "embedding_table": _describe_table(manifest),
            "max_positions": base.max_positions,
            "modalities": list(base.modalities),
            "tokenizer": base.tokenizer,
            "tokenizer_digest": deployed_tokenizer_digest(folder, manifest) or None,
            "token_types": base.token_types,
            "tokenizer_types": base.tokenizer_types,
            "chat_template": base.chat_template,
            **_describe_generation(base),
            **({} if base.pooling is None else {"pooling": to_builtins(base.pooling)}),
            "unused_tensors": list(base.unused_tensors),
        },
        **({} if base.vision is None else {"vision": _describe_vision(folder, manifest, base.vision)}),
        "variants": {
            name: {
                "target": variant.target,
                "backends": list(variant.backends),
                "quantization": None if variant.quantization is None else to_builtins(variant.quantization),
                "size_bytes": manifest.size_bytes(variant.files),
                **({"engine": describe_engine(folder, manifest, variant)} if variant.is_compiled else {}),
            }
            for name, variant in manifest.variants.items()
        },
        "tasks": {name: describe_task(manifest, task) for name, task in manifest.tasks.items()},
        "files": len(manifest.files),
        "size_bytes": manifest.size_bytes(manifest.files),
        "integrity": "every file has the digest that the manifest records",
    }


def _describe_table(manifest: Manifest) -> Description:
    """How and where rows of the embedding table are stored; it has no size of its own in a file of a variant."""
    base = manifest.base
    is_own = all(base.embeddings not in variant.files for variant in manifest.variants.values())
    return {
        "encoding": base.embedding_dtype if base.table is None else base.table.encoding,
        "scale": 1.0 if base.table is None else base.table.scale,
        "file": base.embeddings,
        "size_bytes": manifest.size_bytes((base.embeddings,)) if is_own else 0,
    }


def _describe_generation(base: Base) -> Description:
    """How tokens are chosen by default, and what of the checkpoint's generation config is not applied."""
    if base.generation is None:
        return {}
    return {
        "generation_defaults": to_builtins(base.generation.applied()),
        "generation_not_applied": list(base.generation.not_applied),
    }


def _describe_vision(folder: Path, manifest: Manifest, vision: Vision) -> Description:
    """What images go through before the engine."""
    from adalink.runtime.vision.preprocess import read_preprocessor

    steps = read_preprocessor((folder / vision.preprocessor).read_bytes(), vision.preprocessor)
    return {
        "architecture": vision.architecture,
        "image_size": list(vision.image_size),
        "image_token_id": vision.image_token_id,
        "tokens_per_image": vision.tokens_per_image,
        "takes_tiles": vision.tiles is not None,
        "takes_patches": vision.patches is not None,
        "preprocessor": to_builtins(steps),
        "size_bytes": manifest.size_bytes(vision.files),
    }


def describe_task(manifest: Manifest, task: Task) -> Description:
    """Describe one task of a deployment, by what the manifest says of it."""
    from adalink.runtime.storage.adapter_spec import describe_settings

    return {
        **describe_settings(task),
        "adapter_digest": task.adapter_digest,
        "fold": None if task.fold is None else task.fold.kind,
        "size_bytes": manifest.size_bytes(task.files),
    }


def describe_adapter(folder: Path) -> Description:
    """Describe an adapter folder; raises ``AdapterError``."""
    from adalink.runtime.storage.adapter import read_adapter
    from adalink.runtime.storage.adapter_spec import MethodSpec, describe_settings

    adapter = read_adapter(folder)
    config = adapter.config
    return {
        "kind": "adapter",
        "base": config.base_model_name_or_path,
        "base_fingerprint": config.base_fingerprint,
        "tokenizer_digest": config.tokenizer_digest or None,
        "hidden_size": config.hidden_size,
        **describe_settings(config, MethodSpec),
        "parameters": sum(weight.size for weight in adapter.weights.values()),
        "size_bytes": adapter.size_bytes,
        "adapter_digest": adapter.digest,
        "tensors": {name: list(weight.shape) for name, weight in adapter.weights.items()},
    }


def describe_model(spec: str) -> Description:
    """Describe a base model, with the fingerprint that its adapters carry; raises ``ModelError``."""
    from adalink.tools.terminal.quiet import quiet_libraries
    from adalink.training.models.loading import base_fingerprint, input_embedding, load_checkpoint
    from adalink.training.models.source import display_name

    with quiet_libraries():
        checkpoint = load_checkpoint(spec)
    model = checkpoint.model
    table = next(input_embedding(model).parameters())
    return {
        "kind": "model",
        "name": display_name(spec),
        "class": type(model).__name__,
        "architecture": model.config.model_type,
        "fingerprint": base_fingerprint(model),
        "vocab_size": table.shape[0],
        "hidden_size": table.shape[1],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "unused_tensors": list(checkpoint.unused_tensors),
    }


def describe_onnx(path: Path) -> Description:
    """Describe an ONNX file without its external data; raises ``GraphError``."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise GraphError(f"{path} is not a complete ONNX file: {error}; export it again") from error
    if not model.ir_version:  # as of an empty file, which is a message without fields
        raise GraphError(f"{path} is not a complete ONNX file: it says no version of the format; export it again")
    graph = model.graph
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return {
        "kind": "onnx",
        "role": _role({value.name for value in graph.input}, metadata),
        "inputs": {value.name: _type(value) for value in graph.input},
        "outputs": {value.name: _type(value) for value in graph.output},
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "operators": dict(Counter(node.op_type for node in graph.node).most_common()),
        "nodes": len(graph.node),
        "weights": len(graph.initializer),
        "external_data": any(tensor.external_data for tensor in graph.initializer),
        "metadata": metadata,
    }


def _role(inputs: set[str], metadata: dict[str, str]) -> str:
    if "adapter_digest" in metadata:
        return "task graph"
    if "pixel_values" in inputs:
        return "vision graph"
    is_base = "inputs_embeds" in inputs and inputs & {"attention_mask", "sequence_lengths"}
    return "base graph" if is_base else "neither a task graph nor a base graph"


def _type(value: onnx.ValueInfoProto) -> str:
    import onnx

    tensor = value.type.tensor_type
    shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} ({shape})"


@click.command(cls=Verb, short_help="Explain a deployment, adapter, model, ONNX file or engine.")
@click.argument("target", shell_complete=complete_files)
@hub_options
@json_options("Print the description as JSON.")
def command(target: str, access: HubAccess, output: JsonOutput) -> None:
    """Explain TARGET: a deployment, an adapter folder, a base model, an ONNX file or a compiled engine.

    A deployment's files are compared with their digests; a model is loaded to compute its fingerprint. Of an engine's
    plan the record beside it and its header are read; it is loaded only where a GPU is and the manifest vouches for it.

    \b
    Example:
      adalink inspect ./deployment
      adalink inspect ./adapters/topics --json
      adalink inspect ./deployment/tasks/topics/adapter.onnx
      adalink inspect ./deployment/engines/tensorrt-rtx/engine.plan
    """  # noqa: D301
    from adalink.training.models.hub_access import hub_access

    with hub_access(target, access):
        description = describe(target)
    output.give(description, lambda: _show(target, description))
    say_next(*_next(target, description), "--revision", access.revision, output=output)


def _show(target: str, description: Description) -> None:
    from adalink.tools.terminal.console import print_fields

    echo(f"{target}: {description['kind']}")
    print_fields({name: value for name, value in description.items() if name != "kind"}, indent=2)


def _next(target: str, description: Description) -> tuple[str, ...]:
    """What to do with what was described."""
    kind = description["kind"]
    if kind in ("adapter", "model"):
        return "export", "adapter" if kind == "adapter" else "base", target, "--out", "deployment"
    if kind == "deployment":
        return "bench" if description["tasks"] else "serve", target
    return ("doctor",)
