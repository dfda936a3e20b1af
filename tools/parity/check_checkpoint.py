"""The checkpoint's files against the reference model: every tensor is consumed, every parameter comes from a file.

Export and reference load a model through the same library, which drops what it has no place for. So this check reads
the files itself and compares values, not names: a name may be changed while loading, a value may not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adalink.runtime.errors import ModelError
from adalink.tools.parity.report import Check, at_most

NAME = "base/checkpoint"
_INDEX = "model.safetensors.index.json"
_SHOWN = 5
_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"},
}
# Parts that no output of a base depends on: heads of other purposes, if the model has no module of that name, and
# tensors of T5 that no implementation reads.
_HEADS = re.compile(
    r"^((?:\w+\.)?pooler|\w*head|\w*classifier|score|cls|\w+_outputs|vocab_(?:transform|layer_norm|projector)|"
    r"seq_relationship|sequence_summary)\."
)
_LAYER_NUMBER = re.compile(r"(?<=[.])[0-9]+(?=[.])")
_UNREAD = re.compile(r"EncDecAttention\.relative_attention_bias\.weight$")

Array = npt.NDArray[Any]


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
    parameters = {name: _numbers(value) for name, value in model.named_parameters(remove_duplicate=False)}
    buffers = {name: _numbers(value) for name, value in model.named_buffers(remove_duplicate=False)}
    waiting: dict[str, list[str]] = {}
    for name, values in (parameters | buffers).items():
        waiting.setdefault(_digest(values), []).append(name)
    unplaced: list[str] = []
    left_out: list[str] = []
    used: set[str] = set()
    loose = []
    for name, values in _tensors(folder):
        names = waiting.get(_digest(values), [])
        if own := next((one for one in names if one.endswith(name) or name.endswith(one)), None):
            names.remove(own)
            used.add(own)
        else:
            loose.append((name, values))
    for name, values in loose:  # renamed while loading, or in the model no more often than the files hold it
        if names := waiting.get(_digest(values), []):
            used.add(names.pop())
        elif _is_spare(name, values, model, buffers):
            left_out.append(name)
        else:
            unplaced.append(name)
    unplaced += [path.name for path in sorted(folder.glob("adapter_*")) if path.is_file()]
    origins = _filled(model, used)
    made_up = [name for name in parameters if name not in origins and "pooler" not in name]
    return _as_check(unplaced, made_up, left_out)


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


def _filled(model: Any, used: set[str]) -> set[str]:
    """Names of all parameters whose storage a tensor of the files has filled, tied ones too."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    storages = {id(by_name[name]) for name in used if name in by_name}
    return {name for name, parameter in by_name.items() if id(parameter) in storages}


def _is_spare(name: str, values: Array, model: Any, buffers: dict[str, Array]) -> bool:
    """Whether a tensor is of a head that the model lacks, or a constant that the model computes, with its values."""
    last = name.rpartition(".")[2]
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
    if name.endswith("attn.bias") and values.ndim == 4:
        return bool(np.array_equal(values != 0, np.tri(values.shape[-1], dtype=bool)[None, None]))
    if _UNREAD.search(name):
        return True
    head = _HEADS.match(name)
    modules = {module for module, _ in model.named_modules()}
    return head is not None and head[1] not in modules and "lora_" not in name


def _tensors(folder: Path) -> Iterator[tuple[str, Array]]:
    """Names and values of all tensors of the checkpoint, as float32."""
    import ml_dtypes  # noqa: F401  # registers the names of 8-bit floats

    for file in _files(folder):
        try:
            data = np.memmap(file, np.uint8, "r")
            start = 8 + int.from_bytes(data[:8].tobytes(), "little")
            header = json.loads(data[8:start].tobytes())
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                values = np.frombuffer(data[start + begin : start + end].tobytes(), _DTYPES[entry["dtype"]])
                if entry["dtype"] == "BF16":
                    values = (values.astype(np.uint32) << 16).view(np.float32)
                yield name, np.asarray(values.reshape(entry["shape"]), np.float32)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(
                f"{file.name} of {folder.name} cannot be read as safetensors: {type(error).__name__}: {error}; "
                "download it again"
            ) from error


def _files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    try:
        return [folder / name for name in sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{_INDEX} of {folder.name} cannot be read: {type(error).__name__}: {error}") from error


def _numbers(tensor: Any) -> Array:
    import torch

    return np.asarray(tensor.detach().to("cpu", torch.float32).numpy())


def _digest(values: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).hexdigest()
