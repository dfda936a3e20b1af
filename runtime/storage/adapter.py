"""The adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors`` (docs/concepts/file-formats.md).

Training writes it, export reads it, and a deployment has a copy beside each task graph. Weights are float32 here; those
of a compressed adapter are stored in fewer bits.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as save_safetensors

from adalink.runtime.errors import AdapterError, ConfigError
from adalink.runtime.storage.adapter_spec import MethodSpec, find_fault, rank_of, settings_at_default, show_rank
from adalink.runtime.storage.compressed_weights import decode_compressed, encode_compressed
from adalink.runtime.storage.decoding import decode_json
from adalink.runtime.storage.head_spec import HEAD_BIAS, HEAD_WEIGHT
from adalink.runtime.storage.lfs import find_pointer
from adalink.runtime.storage.mmap import Bytes, read_file
from adalink.runtime.storage.safetensors import aligned_header, view_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SOFT_PROMPT_NAME = "soft_prompt"
TABLE_NAME = "text.table.weight"
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

Weights = dict[str, npt.NDArray[np.float32]]


class AdapterConfig(MethodSpec, frozen=True, kw_only=True):
    """Contents of ``adapter_config.json``: the settings of the method, and the base of the training.

    Attributes:
        base_model_name_or_path: display name of the base; only the fingerprint is checked.
        base_fingerprint: digest of the base's input embedding matrix.
        hidden_size: width ``d`` of the embeddings.
        tokenizer_digest: digest of the tokenizer of the training (`adalink.runtime.storage.tokenizer_digest`); empty in
            adapters of older kits, and where no tokenizer was known. It is left out of the file if empty.
        peft_type: always ``"ADALINK"``; distinguishes it from PEFT's methods.

    Raises:
        ConfigError: a setting is out of range, or the description of the base is malformed.
    """

    base_model_name_or_path: str
    base_fingerprint: str
    hidden_size: int
    tokenizer_digest: str = ""
    peft_type: str = "ADALINK"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peft_type != "ADALINK":
            raise ConfigError(f"peft_type is {self.peft_type!r}, expected 'ADALINK': this is another kind of adapter")
        if not 1 <= self.hidden_size <= 1 << 20:
            raise ConfigError(f"hidden_size is {self.hidden_size}, expected 1 to {1 << 20}")
        if fault := find_fault(self, self.hidden_size):
            raise ConfigError(fault.message)
        check_fingerprint(self.base_fingerprint)
        if self.tokenizer_digest:
            check_fingerprint(self.tokenizer_digest)


class _MethodOnly(msgspec.Struct):
    peft_type: str = "ADALINK"


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: its config, its float32 weights by tensor name, and its digest."""

    config: AdapterConfig
    weights: Weights
    digest: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(weight.nbytes for weight in self.weights.values())


def check_fingerprint(value: str) -> None:
    """Check the form ``sha256:<64 hex digits>``; raises ``ConfigError``."""
    prefix, _, digits = value.partition(":")
    if prefix != "sha256" or len(digits) != 64 or not set(digits) <= set("0123456789abcdef"):
        raise ConfigError(f"{value!r} is not a digest: expected 'sha256:' and 64 lower-case hex digits")


def weight_shapes(config: AdapterConfig, vocab_size: int = 0) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of an adapter with this config.

    Args:
        config: the adapter's config.
        vocab_size: rows of its token table, for ``input`` ``"ids"``.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if config.head is not None:
        labels = len(config.head.labels)
        shapes |= {HEAD_WEIGHT: (labels, config.hidden_size), HEAD_BIAS: (labels,)}
    if config.soft_tokens:
        shapes[SOFT_PROMPT_NAME] = (config.soft_tokens, config.hidden_size)
    if config.input == "ids":
        rank = rank_of(config.rank, "text")
        return shapes | {TABLE_NAME: (vocab_size, rank), "text.up.weight": (config.hidden_size, rank)}
    for modality in config.modalities if config.rank else ():
        rank = rank_of(config.rank, modality)
        shapes[f"{modality}.down.weight"] = (rank, config.hidden_size)
        shapes[f"{modality}.up.weight"] = (config.hidden_size, rank)
        if config.bias:
            shapes[f"{modality}.down.bias"] = (rank,)
            shapes[f"{modality}.up.bias"] = (config.hidden_size,)
    return shapes


def make_adapter(config: AdapterConfig, weights: Weights, origin: str = "adapter") -> Adapter:
    """Check ``weights`` against ``config`` and compute the digest; raises ``AdapterError``."""
    table = weights.get(TABLE_NAME)
    expected = weight_shapes(config, vocab_size=len(table) if table is not None and table.ndim else 0)
    if missing := sorted(expected.keys() - weights.keys()):
        raise AdapterError(f"{origin}: tensor {missing[0]!r} is missing; expected {sorted(expected)}")
    if extra := sorted(weights.keys() - expected.keys()):
        raise AdapterError(f"{origin}: tensor {extra[0]!r} is not part of the method; expected {sorted(expected)}")
    for name, shape in expected.items():
        weight = weights[name]
        if weight.shape != shape:
            raise AdapterError(
                f"{origin}: tensor {name!r} has shape {weight.shape}, expected {shape} "
                f"(hidden_size {config.hidden_size}, rank {show_rank(config.rank)}, soft_tokens {config.soft_tokens})"
            )
        if not np.isfinite(weight).all():
            raise AdapterError(f"{origin}: tensor {name!r} holds NaN or infinity; train again with a lower rate")
    ordered = {name: np.ascontiguousarray(weights[name], dtype=np.float32) for name in expected}
    return Adapter(config=config, weights=ordered, digest=_digest(config, ordered))


def read_adapter(folder: str | Path) -> Adapter:
    """Read and check an adapter folder.

    Raises:
        AdapterError: a file is missing, truncated or pickled; a tensor is missing, misshapen, NaN or infinite.
    """
    config_bytes, weights_bytes = read_folder(folder)
    return decode_adapter(config_bytes, weights_bytes, origin=f"adapter {folder}")


def read_folder(folder: str | Path) -> tuple[bytes, Bytes]:
    """Bytes of the two files of an adapter folder, the kit's or PEFT's; raises ``AdapterError``."""
    folder = Path(folder)
    if not os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        raise AdapterError(f"adapter {folder}: no such folder; expected one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(f"adapter {folder}: {WEIGHTS_FILE} is missing{_whereabouts(folder)}")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if pointer := find_pointer(folder / name):
            raise AdapterError(f"adapter {folder}: {name} {pointer}")
    try:
        return read_file(folder / CONFIG_FILE).tobytes(), read_file(folder / WEIGHTS_FILE)
    except OSError as error:
        raise AdapterError(f"adapter {folder}: cannot read {error.filename}: {error.strerror}") from error


def _whereabouts(folder: Path) -> str:
    """What a folder holds instead of the weights, to follow "is missing"; empty if nothing explains it."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        return f", and the folder cannot be listed: {error.strerror}"
    # PEFT saves an adapter in a folder of its name, and only one that is called "default" in the folder itself.
    inner = [path.name for path in entries if (path / WEIGHTS_FILE).is_file()]
    if inner:
        return f"; adapters lie one level down, in {', '.join(inner[:5])}: give {folder / inner[0]}"
    pickled = [path.name for path in entries if path.suffix in _PICKLED_SUFFIXES]
    return f"; {pickled[0]} is pickled, which can run code, and is never loaded: convert it" if pickled else ""


def decode_tensors(weights_bytes: Bytes, origin: str) -> Weights:
    """Tensors of ``adapter_model.safetensors`` as float32, views if stored so; raises ``AdapterError``."""
    try:
        return view_tensors(weights_bytes)
    except ValueError as error:
        raise AdapterError(f"{origin}: {WEIGHTS_FILE} is not a complete safetensors file: {error}") from error


def read_method(config_bytes: bytes, origin: str) -> str:
    """The ``peft_type`` of ``adapter_config.json``; raises ``AdapterError``."""
    try:
        return decode_json(config_bytes, _MethodOnly).peft_type
    except msgspec.DecodeError as error:
        raise AdapterError(f"{origin}: {CONFIG_FILE}: {error}") from error


def decode_adapter(config_bytes: bytes, weights_bytes: Bytes, origin: str) -> Adapter:
    """Decode and check an adapter from its two files; weights are views of the second. Raises ``AdapterError``."""
    if (method := read_method(config_bytes, origin)) != "ADALINK":
        raise AdapterError(
            f"{origin}: peft_type is {method!r}, expected 'ADALINK': another method wrote it; 'adalink export adapter' "
            "makes tasks of those of PEFT's that act at the input alone"
        )
    try:
        config = decode_json(config_bytes, AdapterConfig)
    except (msgspec.DecodeError, ConfigError) as error:
        raise AdapterError(f"{origin}: {CONFIG_FILE}: {error}") from error
    if config.weight_dtype == "float32":
        return make_adapter(config, decode_tensors(weights_bytes, origin), origin)
    try:
        weights = decode_compressed(weights_bytes, config.weight_dtype, config.hidden_size)
    except ValueError as error:
        raise AdapterError(f"{origin}: {WEIGHTS_FILE}, of weight_dtype {config.weight_dtype}: {error}") from error
    return make_adapter(config, weights, origin)


def encode_adapter(adapter: Adapter) -> tuple[bytes, bytes]:
    """Bytes of ``adapter_config.json`` and ``adapter_model.safetensors``; encoding is deterministic.

    The tensors begin at a multiple of 64 bytes, so that they are aligned in a mapped file.

    Raises:
        AdapterError: the weights are not those of the config's ``weight_dtype``.
    """
    config = msgspec.json.format(_encode_config(adapter.config), indent=2) + b"\n"
    try:
        tensors = encode_compressed(adapter.weights, adapter.config.weight_dtype)
    except ValueError as error:
        raise AdapterError(f"adapter: {error}") from error
    data = save_safetensors(tensors, metadata={"format": "pt"})
    start = 8 + int.from_bytes(data[:8], "little")
    return config, aligned_header(data[8:start]) + data[start:]


def _encode_config(config: AdapterConfig) -> bytes:
    """The config as JSON; later settings are omitted at their default, so that digests stay the same."""
    fields = msgspec.to_builtins(config)
    for name in settings_at_default(config):
        del fields[name]
    if not config.tokenizer_digest:
        del fields["tokenizer_digest"]
    return msgspec.json.encode(fields, order="sorted")


def _digest(config: AdapterConfig, weights: Weights) -> str:
    """Digest of everything that changes the result; the base's display name is left out."""
    state = hashlib.sha256(_encode_config(msgspec.structs.replace(config, base_model_name_or_path="")))
    for name in sorted(weights):
        state.update(f"\0{name}\0".encode())
        state.update(weights[name].astype("<f4", copy=False).data)
    return f"sha256:{state.hexdigest()}"
