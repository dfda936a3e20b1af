"""The adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors`` (docs/formats.md).

Training writes it, export reads it, and a deployment ships a copy beside each task graph. Weights are held as float32.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as save_safetensors

from adalink.runtime.errors import AdapterError, ConfigError
from adalink.runtime.file_memory import Bytes, read_file
from adalink.runtime.tensors import aligned_header, view_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "tanh")
# What the arithmetic of a task is called, whatever its weights: one bank graph each (docs/formats.md).
KINDS = tuple(f"{activation}{bias}" for activation in ACTIVATIONS for bias in ("", "_bias"))
SCOPES = ("all", "prompt")
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

Weights = dict[str, npt.NDArray[np.float32]]
# Width of the bottleneck: of every modality, or of each by its name.
Rank = int | dict[str, int]


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What ``adapter_config.json`` holds.

    Attributes:
        base_model_name_or_path: name of the base, for people; the fingerprint is what is checked.
        base_fingerprint: digest of the base's input embedding matrix.
        hidden_size: width ``d`` of the embeddings.
        rank: width ``r`` of the bottleneck, or of each modality's.
        activation: one of ``ACTIVATIONS``; ``gelu`` is the exact erf form.
        bias: whether ``down`` and ``up`` carry a bias.
        modalities: names of the adapted modalities; one AdaLink each.
        scope: ``"all"`` adapts every position, ``"prompt"`` leaves generated tokens unadapted.
    """

    base_model_name_or_path: str
    base_fingerprint: str
    hidden_size: int
    rank: Rank
    activation: str
    bias: bool
    modalities: tuple[str, ...]
    scope: str
    peft_type: str = "ADALINK"

    def __post_init__(self) -> None:
        check_method(self.rank, self.activation, self.modalities, self.scope)
        if self.peft_type != "ADALINK":
            raise ConfigError(f"peft_type is {self.peft_type!r}, expected 'ADALINK': this is another kind of adapter")
        if not 1 <= self.hidden_size <= 1 << 20:
            raise ConfigError(f"hidden_size is {self.hidden_size}, expected 1 to {1 << 20}")
        if max(rank_of(self.rank, modality) for modality in self.modalities) > self.hidden_size:
            raise ConfigError(
                f"rank is {show_rank(self.rank)} and hidden_size {self.hidden_size}: a bottleneck wider than the "
                f"embedding saves nothing; choose a rank of at most {self.hidden_size}"
            )
        check_fingerprint(self.base_fingerprint)

    @property
    def kind(self) -> str:
        """Which of ``KINDS`` computes this adapter."""
        return f"{self.activation}_bias" if self.bias else self.activation


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


def rank_of(rank: Rank, modality: str) -> int:
    """The rank of one modality."""
    return rank[modality] if isinstance(rank, dict) else rank


def show_rank(rank: Rank) -> str:
    """A rank for people and as ``adalink train`` takes it: ``16``, or ``text=16,image=64``."""
    return ",".join(f"{name}={own}" for name, own in rank.items()) if isinstance(rank, dict) else str(rank)


def check_method(rank: Rank, activation: str, modalities: tuple[str, ...], scope: str) -> None:
    """Check the settings of the method; raises ``ConfigError``."""
    ranks = list(rank.values()) if isinstance(rank, dict) else [rank]
    if any(isinstance(own, bool) or not isinstance(own, int) or own < 1 for own in ranks):
        raise ConfigError(f"rank is {rank!r}, expected a whole number of at least 1, or one for each modality")
    if isinstance(rank, dict) and rank.keys() != set(modalities):
        raise ConfigError(
            f"rank is for {', '.join(rank) or 'nothing'} and the modalities are {', '.join(modalities)}: expected one "
            "rank, or one for each modality"
        )
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if scope not in SCOPES:
        raise ConfigError(f"scope is {scope!r}, expected one of {', '.join(SCOPES)}")
    if not modalities or len(set(modalities)) != len(modalities):
        raise ConfigError(f"modalities are {modalities!r}, expected at least one name and none twice")
    for name in modalities:
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f"modality {name!r} is not a name: use letters, digits and underscores")


def check_fingerprint(value: str) -> None:
    """Check the form ``sha256:<64 hex digits>``; raises ``ConfigError``."""
    prefix, _, digits = value.partition(":")
    if prefix != "sha256" or len(digits) != 64 or not set(digits) <= set("0123456789abcdef"):
        raise ConfigError(f"{value!r} is not a digest: expected 'sha256:' and 64 lower-case hex digits")


def weight_shapes(config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes that an adapter with this config must hold, all of them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for modality in config.modalities:
        rank = rank_of(config.rank, modality)
        shapes[f"{modality}.down.weight"] = (rank, config.hidden_size)
        shapes[f"{modality}.up.weight"] = (config.hidden_size, rank)
        if config.bias:
            shapes[f"{modality}.down.bias"] = (rank,)
            shapes[f"{modality}.up.bias"] = (config.hidden_size,)
    return shapes


def make_adapter(config: AdapterConfig, weights: Weights, origin: str = "adapter") -> Adapter:
    """Check ``weights`` against ``config`` and give them their digest; raises ``AdapterError``."""
    expected = weight_shapes(config)
    if missing := sorted(expected.keys() - weights.keys()):
        raise AdapterError(f"{origin}: tensor {missing[0]!r} is missing; expected {sorted(expected)}")
    if extra := sorted(weights.keys() - expected.keys()):
        raise AdapterError(f"{origin}: tensor {extra[0]!r} is not part of the method; expected {sorted(expected)}")
    for name, shape in expected.items():
        weight = weights[name]
        if weight.shape != shape:
            raise AdapterError(
                f"{origin}: tensor {name!r} has shape {weight.shape}, expected {shape} "
                f"(hidden_size {config.hidden_size}, rank {show_rank(config.rank)})"
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
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"adapter {folder}: no such folder; expected one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED_SUFFIXES)
        hint = f"; {pickled[0]} is pickled, which can run code, and is never loaded: convert it" if pickled else ""
        raise AdapterError(f"adapter {folder}: {WEIGHTS_FILE} is missing{hint}")
    try:
        config_bytes = (folder / CONFIG_FILE).read_bytes()
        weights_bytes = read_file(folder / WEIGHTS_FILE)
    except OSError as error:
        raise AdapterError(f"adapter {folder}: cannot read {error.filename}: {error.strerror}") from error
    return decode_adapter(config_bytes, weights_bytes, origin=f"adapter {folder}")


def decode_adapter(config_bytes: bytes, weights_bytes: Bytes, origin: str) -> Adapter:
    """Check an adapter given as its two files; its weights are views of the second. Raises ``AdapterError``."""
    try:
        config = msgspec.json.decode(config_bytes, type=AdapterConfig)
    except (msgspec.DecodeError, ConfigError) as error:
        raise AdapterError(f"{origin}: {CONFIG_FILE}: {error}") from error
    try:
        tensors = view_tensors(weights_bytes)
    except ValueError as error:
        raise AdapterError(f"{origin}: {WEIGHTS_FILE} is not a complete safetensors file: {error}") from error
    return make_adapter(config, tensors, origin)


def encode_adapter(adapter: Adapter) -> tuple[bytes, bytes]:
    """Bytes of ``adapter_config.json`` and ``adapter_model.safetensors``; the same adapter gives the same bytes.

    The tensors begin at a multiple of 64 bytes, so that in a map of the file they are aligned.
    """
    config = msgspec.json.format(msgspec.json.encode(adapter.config, order="sorted"), indent=2) + b"\n"
    data = save_safetensors(dict(adapter.weights), metadata={"format": "pt"})
    start = 8 + int.from_bytes(data[:8], "little")
    return config, aligned_header(data[8:start]) + data[start:]


def _digest(config: AdapterConfig, weights: Weights) -> str:
    """Digest of all that changes the arithmetic; the base's display name does not."""
    state = hashlib.sha256(
        msgspec.json.encode(msgspec.structs.replace(config, base_model_name_or_path=""), order="sorted")
    )
    for name in sorted(weights):
        state.update(f"\0{name}\0".encode())
        state.update(weights[name].astype("<f4", copy=False).data)
    return f"sha256:{state.hexdigest()}"
