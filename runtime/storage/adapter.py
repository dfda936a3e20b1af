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

from adalink.runtime.errors import NOT_JSON, AdapterError, ConfigError
from adalink.runtime.storage.mmap import Bytes, read_file
from adalink.runtime.storage.safetensors import aligned_header, view_tensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "tanh")
# What the arithmetic of a task is called, whatever its weights: one bank graph each (docs/formats.md).
KINDS = tuple(f"{activation}{bias}" for activation in ACTIVATIONS for bias in ("", "_bias"))
SCOPES = ("all", "prompt")
INPUTS = ("embeddings", "ids")
# A soft prompt takes up positions of the model: far more of them than anybody trains would be a mistake.
MOST_SOFT_TOKENS = 4096
SOFT_PROMPT_NAME = "soft_prompt"
TABLE_NAME = "text.table.weight"
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
        rank: width ``r`` of the bottleneck, or of each modality's; 0 for a soft prompt alone.
        activation: one of ``ACTIVATIONS``; ``gelu`` is the exact erf form.
        bias: whether ``down`` and ``up`` carry a bias.
        modalities: names of the adapted modalities; one AdaLink each.
        scope: ``"all"`` adapts every position, ``"prompt"`` leaves generated tokens unadapted.
        soft_tokens: vectors of the soft prompt, which stand before the first token and go through no bottleneck.
        input: what the bottleneck starts from: ``"embeddings"``, ``x + up(act(down(x)))``; or the token's ``"ids"``,
            ``x + up(table[id])``.
    """

    base_model_name_or_path: str
    base_fingerprint: str
    hidden_size: int
    rank: Rank
    activation: str
    bias: bool
    modalities: tuple[str, ...]
    scope: str
    soft_tokens: int = 0
    input: str = "embeddings"
    peft_type: str = "ADALINK"

    def __post_init__(self) -> None:
        check_method(self.rank, self.activation, self.modalities, self.scope, self.soft_tokens)
        if self.peft_type != "ADALINK":
            raise ConfigError(f"peft_type is {self.peft_type!r}, expected 'ADALINK': this is another kind of adapter")
        if not 1 <= self.hidden_size <= 1 << 20:
            raise ConfigError(f"hidden_size is {self.hidden_size}, expected 1 to {1 << 20}")
        if max(rank_of(self.rank, modality) for modality in self.modalities) > self.hidden_size:
            raise ConfigError(
                f"rank is {show_rank(self.rank)} and hidden_size {self.hidden_size}: a bottleneck wider than the "
                f"embedding saves nothing; choose a rank of at most {self.hidden_size}"
            )
        if self.input not in INPUTS:
            raise ConfigError(f"input is {self.input!r}, expected one of {', '.join(INPUTS)}")
        is_plain = self.activation == "identity" and not self.bias
        if self.rank == 0 and not (is_plain and self.input == "embeddings"):
            raise ConfigError(
                f"rank is 0 with activation {self.activation!r}, bias {self.bias} and input {self.input!r}: a soft "
                "prompt without a bottleneck has activation 'identity', no bias and input 'embeddings'"
            )
        if self.input == "ids" and not (is_plain and self.modalities == ("text",)):
            raise ConfigError(
                f"input is 'ids' with activation {self.activation!r}, bias {self.bias} and modalities "
                f"{self.modalities!r}: a table of token ids has activation 'identity', no bias and modalities ('text',)"
            )
        check_fingerprint(self.base_fingerprint)

    @property
    def kind(self) -> str:
        """Which of ``KINDS`` computes this adapter."""
        return f"{self.activation}_bias" if self.bias else self.activation


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


def rank_of(rank: Rank, modality: str) -> int:
    """The rank of one modality."""
    return rank[modality] if isinstance(rank, dict) else rank


def show_rank(rank: Rank) -> str:
    """A rank for people and as ``adalink train`` takes it: ``16``, or ``text=16,image=64``."""
    return ",".join(f"{name}={own}" for name, own in rank.items()) if isinstance(rank, dict) else str(rank)


def check_method(rank: Rank, activation: str, modalities: tuple[str, ...], scope: str, soft_tokens: int = 0) -> None:
    """Check the settings of the method; raises ``ConfigError``."""
    if isinstance(soft_tokens, bool) or not isinstance(soft_tokens, int) or not 0 <= soft_tokens <= MOST_SOFT_TOKENS:
        raise ConfigError(f"soft_tokens is {soft_tokens!r}, expected a whole number from 0 to {MOST_SOFT_TOKENS}")
    ranks = list(rank.values()) if isinstance(rank, dict) else [rank]
    least = 0 if soft_tokens and not isinstance(rank, dict) else 1
    if any(isinstance(own, bool) or not isinstance(own, int) or own < least for own in ranks):
        hint = "" if soft_tokens else "; 0 is for adapters with a soft prompt"
        raise ConfigError(
            f"rank is {rank!r}, expected a whole number of at least {least}, or one for each modality{hint}"
        )
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


def weight_shapes(config: AdapterConfig, vocab_size: int = 0) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes that an adapter with this config must hold, all of them.

    Args:
        config: the adapter's.
        vocab_size: rows of its table of token ids, for ``input`` ``"ids"``.
    """
    shapes: dict[str, tuple[int, ...]] = {}
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
    """Check ``weights`` against ``config`` and give them their digest; raises ``AdapterError``."""
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
    """The two files of an adapter folder, the kit's own or PEFT's, undecoded; raises ``AdapterError``."""
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"adapter {folder}: no such folder; expected one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED_SUFFIXES)
        hint = f"; {pickled[0]} is pickled, which can run code, and is never loaded: convert it" if pickled else ""
        raise AdapterError(f"adapter {folder}: {WEIGHTS_FILE} is missing{hint}")
    try:
        return (folder / CONFIG_FILE).read_bytes(), read_file(folder / WEIGHTS_FILE)
    except OSError as error:
        raise AdapterError(f"adapter {folder}: cannot read {error.filename}: {error.strerror}") from error


def decode_tensors(weights_bytes: Bytes, origin: str) -> Weights:
    """Tensors of ``adapter_model.safetensors`` as float32, views where they are; raises ``AdapterError``."""
    try:
        return view_tensors(weights_bytes)
    except ValueError as error:
        raise AdapterError(f"{origin}: {WEIGHTS_FILE} is not a complete safetensors file: {error}") from error


def read_method(config_bytes: bytes, origin: str) -> str:
    """The method that ``adapter_config.json`` names as ``peft_type``; raises ``AdapterError``."""
    try:
        return msgspec.json.decode(config_bytes, type=_MethodOnly).peft_type
    except NOT_JSON as error:
        raise AdapterError(f"{origin}: {CONFIG_FILE}: {error}") from error


def decode_adapter(config_bytes: bytes, weights_bytes: Bytes, origin: str) -> Adapter:
    """Check an adapter given as its two files; its weights are views of the second. Raises ``AdapterError``."""
    if (method := read_method(config_bytes, origin)) != "ADALINK":
        raise AdapterError(
            f"{origin}: peft_type is {method!r}, expected 'ADALINK': another method wrote it; 'adalink export adapter' "
            "makes tasks of those of PEFT's that act at the input alone"
        )
    try:
        config = msgspec.json.decode(config_bytes, type=AdapterConfig)
    except (*NOT_JSON, ConfigError) as error:
        raise AdapterError(f"{origin}: {CONFIG_FILE}: {error}") from error
    return make_adapter(config, decode_tensors(weights_bytes, origin), origin)


def encode_adapter(adapter: Adapter) -> tuple[bytes, bytes]:
    """Bytes of ``adapter_config.json`` and ``adapter_model.safetensors``; the same adapter gives the same bytes.

    The tensors begin at a multiple of 64 bytes, so that in a map of the file they are aligned.
    """
    config = msgspec.json.format(_encode_config(adapter.config), indent=2) + b"\n"
    data = save_safetensors(dict(adapter.weights), metadata={"format": "pt"})
    start = 8 + int.from_bytes(data[:8], "little")
    return config, aligned_header(data[8:start]) + data[start:]


def _encode_config(config: AdapterConfig) -> bytes:
    """The config as JSON; what came to the format later is left out where it says nothing, so that digests stay."""
    fields = msgspec.to_builtins(config)
    for name, default in (("soft_tokens", 0), ("input", "embeddings")):
        if fields[name] == default:
            del fields[name]
    return msgspec.json.encode(fields, order="sorted")


def _digest(config: AdapterConfig, weights: Weights) -> str:
    """Digest of all that changes the arithmetic; the base's display name does not."""
    state = hashlib.sha256(_encode_config(msgspec.structs.replace(config, base_model_name_or_path="")))
    for name in sorted(weights):
        state.update(f"\0{name}\0".encode())
        state.update(weights[name].astype("<f4", copy=False).data)
    return f"sha256:{state.hexdigest()}"
