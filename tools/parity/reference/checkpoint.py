"""The checkpoint's files against the reference model: every tensor is consumed, every parameter comes from a file.

Export and reference load a model through the same library, which drops what it has no place for. So this check reads
the files itself and compares values, not names: a name may be changed while loading, a value may not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adalink.tools.parity.reference.file_tensors import FileTensor, digest_values, file_tensors
from adalink.tools.parity.report import Check, at_most

NAME = "base/checkpoint"
_SHOWN = 5
# Parts that no output of a base depends on: heads of other purposes, if the model has no module of that name, and
# tensors of T5 that no implementation reads.
_HEADS = re.compile(
    r"^((?:\w+\.)?pooler|\w*head|\w*classifier|score|cls|\w+_outputs|vocab_(?:transform|layer_norm|projector)|"
    r"seq_relationship|sequence_summary)\."
)
_LAYER_NUMBER = re.compile(r"(?<=[.])[0-9]+(?=[.])")
_UNREAD = re.compile(r"EncDecAttention\.relative_attention_bias\.weight$")
_CONSTANTS = ("position_ids", "token_type_ids", "masked_bias", "inv_freq")


def check_files(spec: str | Path, model: Any) -> list[Check]:
    """Check the files of a base, as ``check_checkpoint``; a GGUF file has no safetensors, and no such check."""
    from adalink.training.models.loading import checkpoint_folder

    folder = checkpoint_folder(spec)
    return [] if folder is None else [check_checkpoint(folder, model)]


def check_checkpoint(folder: Path, model: Any) -> Check:
    """Compare the safetensors of a checkpoint with the model that was loaded from it.

    Args:
        folder: the checkpoint's folder.
        model: the reference model, in float32.

    Returns:
        A check whose measured value is the number of tensors that are in one of the two alone. Parts left out on
        purpose are named in its detail.

    Raises:
        ModelError: a file cannot be read.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    digests = _Digests()
    waiting: dict[str, list[str]] = {}
    for name, values in (parameters | buffers).items():
        waiting.setdefault(digests.of(values), []).append(name)
    unplaced: list[str] = []
    left_out: list[str] = []
    used: set[str] = set()
    loose = []
    for tensor in file_tensors(folder):
        digest, name = digests.of_file(tensor), tensor.name
        names = waiting.get(digest, [])
        if own := next((one for one in names if one.endswith(name) or name.endswith(one)), None):
            names.remove(own)
            used.add(own)
        else:
            loose.append((tensor, digest))
    for tensor, digest in loose:  # renamed while loading, or in the model no more often than the files hold it
        if names := waiting.get(digest, []):
            used.add(names.pop())
        elif _is_spare(tensor, model, buffers):
            left_out.append(tensor.name)
        else:
            unplaced.append(tensor.name)
    unplaced += [path.name for path in sorted(folder.glob("adapter_*")) if path.is_file()]
    origins = _filled(parameters, used)
    made_up = [name for name in parameters if name not in origins and "pooler" not in name]
    return _as_check(unplaced, made_up, left_out)


class _Digests:
    """Digests of values in float32. What lies in a file is read once, for the file and for the model."""

    def __init__(self) -> None:
        self._known: dict[FileTensor, str] = {}

    def of(self, values: Any) -> str:
        """Digest of a tensor of the model."""
        source = getattr(values, "source", None)
        return self.of_file(source) if isinstance(source, FileTensor) else digest_values(values)

    def of_file(self, tensor: FileTensor) -> str:
        """Digest of a tensor of a file."""
        if tensor not in self._known:
            self._known[tensor] = digest_values(tensor.read())
        return self._known[tensor]


def _as_check(unplaced: list[str], made_up: list[str], left_out: list[str]) -> Check:
    parts = []
    if unplaced:
        parts.append(f"in the files but not in the model: {_shown(unplaced)}")
    if made_up:
        parts.append(f"in the model but not in the files: {_shown(made_up)}")
    if left_out:
        parts.append(f"left out on purpose: {_shown(sorted({_LAYER_NUMBER.sub('*', name) for name in left_out}))}")
    detail = "; ".join(parts) or "every tensor of the files is in the model"
    return at_most(NAME, len(unplaced) + len(made_up), 0, f"tensors of files and model by value: {detail}")


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _filled(parameters: Mapping[str, Any], used: Collection[str]) -> set[str]:
    """Names of all parameters whose storage a tensor of the files has filled, tied ones too."""
    storages = {id(parameters[name]) for name in used if name in parameters}
    return {name for name, parameter in parameters.items() if id(parameter) in storages}


def _is_spare(tensor: FileTensor, model: Any, buffers: Mapping[str, Any]) -> bool:
    """Whether a tensor is of a head that the model lacks, or a constant that the model computes, with its values."""
    name = tensor.name
    if name.rpartition(".")[2] in _CONSTANTS or (name.endswith("attn.bias") and len(tensor.shape) == 4):
        return _is_computed(tensor, buffers)
    if _UNREAD.search(name):
        return True
    head = _HEADS.match(name)
    modules = {module for module, _ in model.named_modules()}
    return head is not None and head[1] not in modules and "lora_" not in name


def _is_computed(tensor: FileTensor, buffers: Mapping[str, Any]) -> bool:
    """Whether a constant has the values that the model computes for itself."""
    last = tensor.name.rpartition(".")[2]
    values = np.asarray(tensor.read().float().numpy())
    flat = values.reshape(-1)
    if last == "position_ids":
        return bool(np.array_equal(flat, np.arange(flat.size)))
    if last == "token_type_ids":
        return not flat.any()
    if last == "masked_bias":
        return flat.size == 1 and float(flat[0]) <= -1e4
    if last == "inv_freq":
        computed = (buffer for key, buffer in buffers.items() if "inv_freq" in key and buffer.shape == values.shape)
        return any(np.allclose(values, buffer, rtol=0.02, atol=1e-6) for buffer in computed)
    return bool(np.array_equal(values != 0, np.tri(values.shape[-1], dtype=bool)[None, None]))
