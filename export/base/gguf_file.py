"""A GGUF file as a variant of a base: the file as it is, linked where the disk has links, and what its tensors are."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from adalink.export.architectures import Architecture
from adalink.export.base.request import LLAMA_CPP
from adalink.export.hard_links import hard_link
from adalink.export.writer import DeploymentWriter
from adalink.runtime.errors import ConfigError, ModelError
from adalink.runtime.storage.manifest import Base, GgufTensors, Quantization, Variant
from adalink.training.models.gguf.header import read_header

if TYPE_CHECKING:
    from adalink.training.models.gguf.header import TensorPlace

_FLOAT32, _ACTIVATION_BITS = 32, 8


def check_base(architecture: Architecture, name: str, gguf: Path | None, *, has_vision: bool) -> Path:
    """Check that llama.cpp can run a base with embeddings going in; returns its GGUF file.

    Args:
        architecture: the base's entry in the registry.
        name: its display name.
        gguf: the GGUF file that it was loaded from, if it was.
        has_vision: whether it takes images.

    Raises:
        ConfigError: it cannot.
    """
    if gguf is None:
        raise ConfigError(
            f"target {LLAMA_CPP!r} takes a GGUF file, and {name} is none: name the file, or choose another target"
        )
    reasons = {
        f"it is an {architecture.kind}, and llama.cpp decodes embeddings with decoders alone": (
            architecture.kind != "decoder"
        ),
        "it takes images, and what a GGUF file holds is its language model alone": has_vision,
        "its prompts attend in both directions, and llama.cpp reads them in one": architecture.bidirectional_prompt,
        "its positions follow the grid of an image": architecture.position_axes > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"target {LLAMA_CPP!r} cannot run {name}: {reason}; choose the target 'onnxruntime-cpu'")
    return gguf


def register_file(
    writer: DeploymentWriter, base: Base, gguf: Path, weights_digest: str, *, copy: bool = False
) -> Variant:
    """Put a GGUF file into a deployment.

    Args:
        writer: of the deployment.
        base: the base contract.
        gguf: the file.
        weights_digest: digest of the weights that it holds.
        copy: whether it is copied in any case.

    Returns:
        The variant.

    Raises:
        ModelError: llama.cpp computes something else from the base's embeddings than from tokens.
        OSError: the disk is full or read-only.
    """
    relative = f"{writer.fresh_folder(f'base/{LLAMA_CPP}')}/model.gguf"
    path = writer.stage(relative)
    if copy or not hard_link(gguf, path):
        shutil.copyfile(gguf, path)
    return Variant(
        target=LLAMA_CPP,
        quantization=describe(gguf),
        backends=(LLAMA_CPP,),
        graph=relative,
        files=(relative,),
        weights_digest="" if weights_digest == base.weights_digest else weights_digest,
    )


def describe(gguf: Path) -> Quantization | None:
    """The types of a file's matrices; ``None`` if all are float32. Raises ``ModelError``."""
    tensors = [place for place in read_header(gguf).tensors.values() if len(place.shape) == 2]
    counted = Counter(_describe_tensor(place) for place in tensors)
    bits = sorted(kind[1] for kind in counted)
    if bits[0] == _FLOAT32:
        return None
    kinds = tuple(
        GgufTensors(type=name, tensors=count, bits=width, block_size=block, is_exact=True)
        for (name, width, block), count in sorted(counted.items())
    )
    blocks = sorted(kind.block_size for kind in kinds)
    return Quantization(
        algorithm="gguf",
        bits=bits[0],
        block_size=blocks[-1],
        sensitive_bits=bits[-1],
        sensitive_block_size=blocks[0],
        activation_bits=_ACTIVATION_BITS if blocks[-1] else 16,
        gguf=kinds,
    )


def _describe_tensor(place: TensorPlace) -> tuple[str, int, int]:
    """Type, bits of a weight, and weights of a block, 0 without blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    digits = re.search(r"\d+", place.type)
    try:
        block = int(GGML_QUANT_SIZES[GGMLQuantizationType(place.kind)][0])
    except (KeyError, ValueError) as error:
        raise ModelError(f"a tensor has type {place.type}, which the package gguf does not know: update it") from error
    assert digits is not None
    return place.type, int(digits[0]), 0 if block == 1 else block
