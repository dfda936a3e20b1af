"""Tensors of a GGUF file against the model made of it: each one fills a weight, or is refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adalink.runtime.errors import ModelError
from adalink.training.models.gguf.header import GgufHeader
from adalink.training.models.gguf.metadata import ROPE_TENSOR
from adalink.training.models.gguf.t5 import UNUSED_TENSOR

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_layers(header: GgufHeader, layers: int, decoder_layers: int | None = None) -> None:
    """Check that a file has tensors of all the layers that it says, before a model of that many is made.

    Args:
        header: the file's header.
        layers: how many layers the metadata say; of an encoder-decoder, its encoder's.
        decoder_layers: those of an encoder-decoder's decoder.

    Raises:
        ModelError: it has those of fewer.
    """
    stacks = {"blk.": layers} if decoder_layers is None else {"enc.blk.": layers, "dec.blk.": decoder_layers}
    for prefix, count in stacks.items():
        found = {name.removeprefix(prefix).split(".")[0] for name in header.tensors if name.startswith(prefix)}
        if len(found) < count:
            raise ModelError(
                f"base model {header.name}: its metadata say {count} layers and it holds tensors of {len(found)}; "
                "expected as many: download the file again"
            )


def check_tensors(header: GgufHeader, model: PreTrainedModel) -> None:
    """Check that every tensor of a file belongs to a weight of the model.

    transformers reads the tensors that its names ask for and drops the others. That each weight was filled is the
    caller's check.

    Raises:
        ModelError: a tensor belongs to none.
    """
    used = set(gguf_names(header.architecture, model).values()) | {
        ROPE_TENSOR
    }  # that one is a setting, `metadata` takes it
    if header.architecture == "t5":
        used.add(UNUSED_TENSOR)
    if unused := [name for name in header.tensors if name not in used]:
        raise ModelError(
            f"base model {header.name}: {len(unused)} of its {len(header.tensors)} tensors would be dropped, the first "
            f"{unused[0]!r}; expected those of a {type(model).__name__} alone: merge adapters into the model before it "
            "is converted, or export the original checkpoint instead"
        )


def check_shapes(header: GgufHeader, model: PreTrainedModel) -> None:
    """Check that weights have the shapes that the metadata say; transformers before 5.23 takes others without a word.

    Raises:
        ModelError: a tensor has another shape.
    """
    import torch

    with torch.device("meta"):
        expected = {name: weight.shape for name, weight in type(model)(model.config).state_dict().items()}
    for name, weight in model.state_dict().items():
        if weight.shape != expected[name]:
            raise ModelError(
                f"base model {header.name}: the tensor of {name} has shape {tuple(weight.shape)}, and the metadata say "
                f"{tuple(expected[name])}; expected the metadata of these tensors: download the file again"
            )


def gguf_names(architecture: str, model: PreTrainedModel) -> dict[str, str]:
    """GGUF name of each weight of a model, by the table of the ``gguf`` package."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(kinds[architecture], model.config.num_hidden_layers)
    names = {}
    for name in model.state_dict():
        stem, dot, ending = name.rpartition(".")
        known = table.get_name(stem)
        if known is not None:
            names[name] = f"{known}{dot}{ending}"
    return names
