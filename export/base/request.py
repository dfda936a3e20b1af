"""What is asked of an export of a base, checked before the model is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from adalink.export.architectures import check_model_type
from adalink.export.base.gguf_codes import FLOATS
from adalink.export.base.quantize import SCHEMES
from adalink.export.writer import check_new
from adalink.runtime.errors import ConfigError, DeploymentError, ModelError, WriteError
from adalink.runtime.storage.atomic import check_writable
from adalink.runtime.storage.manifest import DTYPES, MANIFEST_FILE, Manifest
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.stamp import Stamp, stamp_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adalink.training.models.source import Source

LLAMA_CPP = "llama.cpp"
TARGETS = {
    "portable": ("onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"),
    "onnxruntime-cpu": ("onnxruntime-cpu",),
    "onnxruntime-cuda": ("onnxruntime-cuda",),
    LLAMA_CPP: (LLAMA_CPP,),
}
QUANTIZED_TARGETS = ("onnxruntime-cpu",)
_REPAIR = "free space, or choose a writable --out"


def check_settings(dtype: str, target: str, quantization: str | None, modalities: tuple[str, ...] = ("text",)) -> None:
    """Check settings of an export against each other; raises ``ConfigError``."""
    if modalities[:1] != ("text",) or len(set(modalities)) != len(modalities):
        raise ConfigError(f"modalities are {modalities}, expected 'text' first and no name twice")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if target not in TARGETS:
        raise ConfigError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")
    if target == LLAMA_CPP and (dtype != "float32" or quantization is not None):
        raise ConfigError(
            f"target {LLAMA_CPP!r} runs a GGUF file as it is, in whatever types it has, and is fed float32 embeddings: "
            "leave --dtype and --quantize out"
        )
    if dtype == "bfloat16" and target == "onnxruntime-cpu":
        raise ConfigError(
            "target 'onnxruntime-cpu' cannot run bfloat16: ONNX Runtime's CPU provider has no such kernels; choose "
            "float32 or float16, or the target 'onnxruntime-cuda' or 'portable'"
        )
    if quantization is None:
        return
    if quantization not in SCHEMES:
        raise ConfigError(f"quantization is {quantization!r}, expected one of {', '.join(SCHEMES)}")
    if target not in QUANTIZED_TARGETS:
        raise ConfigError(
            f"target {target!r} cannot be quantised to {quantization}: the operator is ONNX Runtime's own and is "
            f"measured on its CPU provider; choose the target {' or '.join(QUANTIZED_TARGETS)}"
        )
    if dtype != "float32":
        raise ConfigError(
            f"quantization {quantization!r} is for dtype float32, not {dtype}: only the matrices are quantised, and "
            "the CPU provider computes what is left in float32 in any case; leave --dtype out"
        )


def check_place(out: Path, variant: str, *, replace: bool) -> None:
    """Check that a variant can be written into a deployment, or into a new one.

    Raises:
        DeploymentError: the variant is there already, or the folder is no deployment.
        WriteError: the folder cannot be written.
    """
    check_new(out)
    if (out / MANIFEST_FILE).exists():
        check_free(read_manifest(out), variant, out, replace=replace)
    check_writable(out, repair=_REPAIR)


def check_free(manifest: Manifest, variant: str, out: Path, *, replace: bool) -> None:
    """Refuse to write a variant again that is there already; raises ``DeploymentError``."""
    if variant in manifest.variants and not replace:
        raise DeploymentError(
            f"deployment {out} already has a base variant {variant!r}: pass --replace to write it again"
        )


def check_model(model: str | Path, out: Path) -> None:
    """Check that there is such a checkpoint, of a type that can be exported, and space for it; loads nothing.

    Raises:
        ModelError: there is no such model, or its type is not supported.
        WriteError: the disk has less space than half of the weights take.
    """
    from adalink.training.models.base_kind import read_config
    from adalink.training.models.source import find_source

    source = find_source(model)
    config = read_config(source)
    if config is not None and not any(name.endswith("_config") and isinstance(config[name], dict) for name in config):
        check_model_type(config.get("model_type"))
    size = sum(path.stat().st_size for path in _weight_paths(source))
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(there).free) < size // 2:
        raise WriteError(
            f"{there} has {free / 1e6:.0f} MB of free space, and the model's weights alone take {size / 1e6:.0f} MB: "
            f"{_REPAIR}"
        )


def weight_stamps(model: str | Path | PreTrainedModel) -> dict[Path, Stamp]:
    """Stamps of a checkpoint's weight files, which export and verify read several times; none for a loaded model."""
    from adalink.training.models.source import find_source

    paths = _weight_paths(find_source(model)) if isinstance(model, (str, Path)) else []
    return {path: stamp_of(path.stat()) for path in paths}


def check_unchanged(stamps: dict[Path, Stamp]) -> None:
    """Check that weight files are those of ``weight_stamps``; raises ``ModelError``."""
    for path, stamp in stamps.items():
        if not path.exists() or stamp_of(path.stat()) != stamp:
            raise ModelError(
                f"{path} changed while it was read, so that the weights may be of two models: try again when nothing "
                "writes to it"
            )


def _weight_paths(source: Source) -> list[Path]:
    return [source.gguf_path] if source.gguf_path is not None else sorted(Path(source.origin).glob("*.safetensors"))


def codes_file(model: str | Path | PreTrainedModel) -> Path:
    """The GGUF file whose codes shall be kept; loads nothing.

    Raises:
        ModelError: there is no such model, or the file cannot be read.
        ConfigError: it is no GGUF file, or none of its matrices is quantised.
    """
    from adalink.training.models.source import display_name, gguf_file

    path = gguf_file(model) if isinstance(model, (str, Path)) else None
    if path is None:
        name = display_name(model) if isinstance(model, (str, Path)) else f"a loaded {type(model).__name__}"
        raise ConfigError(
            f"quantization 'gguf' keeps the codes of a GGUF file, and {name} is none: choose int4 or int8"
        )
    if not quantized_types(path):
        raise ConfigError(
            f"quantization 'gguf' keeps the codes of a quantised GGUF file, and the matrices of {path.name} are "
            "floating point: choose int4 or int8"
        )
    return path


def quantized_types(model: str | Path) -> tuple[str, ...]:
    """Types of a GGUF file's matrices that are quantised; none for another kind of model. Raises ``ModelError``."""
    from adalink.training.models.gguf.header import read_header
    from adalink.training.models.source import gguf_file

    path = gguf_file(model)
    tensors = () if path is None else read_header(path).tensors.values()
    return tuple(sorted({tensor.type for tensor in tensors if len(tensor.shape) == 2} - {*FLOATS}))
