"""Adapter settings, declared and checked in one place.

The config of an adapter folder, a task of a manifest and ``AdaLinkConfig`` inherit ``AdapterSpec``. The metadata of a
task graph, ``adalink inspect`` and the parity checks read it. A new setting is one field with a default, and a rule in
``find_fault`` if some values are invalid.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.head_spec import Head, fault_in_head
from adalink.runtime.storage.label_spec import LabelSet, fault_in_labels

ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "tanh")
# Activation and bias of an adapter; one shared adapter graph for each (docs/concepts/file-formats.md).
ACTIVATION_KEYS = tuple(f"{activation}{bias}" for activation in ACTIVATIONS for bias in ("", "_bias"))
SCOPES = ("all", "prompt")
INPUTS = ("embeddings", "ids")
# How the bottleneck's matrices are stored, and the bits of a number.
WEIGHT_BITS = {"float32": 32, "int8": 8, "int4": 4}
_CHOICES = {"activation": ACTIVATIONS, "scope": SCOPES, "input": INPUTS, "weight_dtype": tuple(WEIGHT_BITS)}
# A soft prompt occupies positions of the model; a longer one is taken for a mistake.
MOST_SOFT_TOKENS = 4096

# Width of the bottleneck: one for all modalities, or one for each by name.
Rank = int | dict[str, int]


class AdapterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Adapter settings that appear everywhere: config, manifest, task graph metadata, reports.

    A setting without a default is in every file. One with a default was added later: ``adapter_config.json`` and
    metadata omit it at its default, so that older digests and graphs stay valid.

    Attributes:
        rank: width ``r`` of the bottleneck, or one for each modality: ``{"text": 16, "image": 64}``; 0 for a soft
            prompt or a head alone.
        activation: one of ``ACTIVATIONS``; ``gelu`` is the exact erf form.
        scope: ``"all"`` adapts every position, ``"prompt"`` leaves generated and target tokens unadapted.
        modalities: names of the adapted modalities; each has separate weights.
        soft_tokens: length of the soft prompt, which is prepended to the sequence and skips the bottleneck.
        input: input of the bottleneck: ``"embeddings"``, ``x + up(act(down(x)))``; or token ``"ids"``,
            ``x + up(table[id])``.
        head: labels and pooling of a task on an encoder; ``None`` without.
        labels: labels of a task whose completions are labels; ``None`` without.
        weight_dtype: how ``down`` and ``up`` are stored: ``"float32"``, or by row as ``"int8"`` or ``"int4"``.
        nested: whether the bottleneck's dimensions are ordered, so that the first ``k`` of them are an adapter too.
    """

    rank: Rank
    activation: str
    scope: str
    modalities: tuple[str, ...]
    soft_tokens: int = 0
    input: str = "embeddings"
    head: Head | None = None
    labels: LabelSet | None = None
    weight_dtype: str = "float32"
    nested: bool = False

    @property
    def prepended_positions(self) -> int:
        """Positions that the adapter puts before every sequence; a prompt has so many fewer."""
        return self.soft_tokens


class MethodSpec(AdapterSpec, frozen=True, kw_only=True):
    """All settings of the method, validated on creation: ``AdapterSpec``, and those that the manifest omits.

    Attributes:
        bias: whether ``down`` and ``up`` carry a bias.

    Raises:
        ConfigError: a setting is out of range.
    """

    bias: bool

    def __post_init__(self) -> None:
        if fault := find_fault(self):
            raise ConfigError(fault.message)
        is_empty = self.activation == "identity" and not self.bias
        if self.rank == 0 and not (is_empty and self.input == "embeddings"):
            raise ConfigError(
                f"rank is 0 with activation {self.activation!r}, bias {self.bias} and input {self.input!r}, expected "
                "'identity', no bias and input 'embeddings': a soft prompt or a head alone has activation 'identity' "
                "and no bias"
            )
        if (self.nested or self.weight_dtype != "float32") and (self.rank == 0 or self.input == "ids"):
            raise ConfigError(
                f"weight_dtype is {self.weight_dtype!r} and nested {self.nested} with rank {show_rank(self.rank)} and "
                f"input {self.input!r}: expected 'float32' and false, as only a bottleneck is compressed"
            )
        if self.input == "ids" and not (is_empty and self.modalities == ("text",)):
            raise ConfigError(
                f"input is 'ids' with activation {self.activation!r}, bias {self.bias} and modalities "
                f"{self.modalities!r}: a table of token ids has activation 'identity', no bias and modalities ('text',)"
            )

    @property
    def activation_key(self) -> str:
        """The key among ``ACTIVATION_KEYS``: activation and bias."""
        return f"{self.activation}_bias" if self.bias else self.activation


class Fault(NamedTuple):
    """An invalid setting: its name, and the full message."""

    field: str
    message: str


def find_fault(spec: AdapterSpec, hidden_size: int | None = None) -> Fault | None:
    """The first invalid setting, or ``None``.

    Args:
        spec: the settings.
        hidden_size: width of the base's embeddings, the upper limit of ranks.
    """
    soft_tokens, rank, modalities = spec.soft_tokens, spec.rank, spec.modalities
    if not _is_whole(soft_tokens) or not 0 <= soft_tokens <= MOST_SOFT_TOKENS:
        expected = f"a whole number from 0 to {MOST_SOFT_TOKENS}"
        return Fault("soft_tokens", f"soft_tokens is {soft_tokens!r}, expected {expected}")
    if message := _fault_in_rank(rank, modalities, bool(soft_tokens or spec.head), hidden_size):
        return Fault("rank", message)
    if spec.head is not None and (message := fault_in_head(spec.head)):
        return Fault("head", message)
    if spec.labels is not None:
        if message := fault_in_labels(spec.labels):
            return Fault("labels", message)
        if spec.head is not None:
            return Fault("labels", "labels are beside a head, which has its own: expected one of the two")
    for field, known in (
        ("activation", ACTIVATIONS),
        ("scope", SCOPES),
        ("input", INPUTS),
        ("weight_dtype", WEIGHT_BITS),
    ):
        if (value := getattr(spec, field)) not in known:
            return Fault(field, f"{field} is {value!r}, expected one of {', '.join(known)}")
    if spec.nested and spec.activation != "identity":
        return Fault("nested", f"nested is true with activation {spec.activation!r}, expected 'identity'")
    if not modalities or len(set(modalities)) != len(modalities):
        return Fault("modalities", f"modalities are {modalities!r}, expected at least one name and none twice")
    for name in modalities:
        if not isinstance(name, str) or not name.isidentifier():
            return Fault("modalities", f"modality {name!r} is not a name: use letters, digits and underscores")
    if hidden_size is not None and max(rank_of(rank, name) for name in modalities) > hidden_size:
        return Fault(
            "rank",
            f"rank is {show_rank(rank)} and hidden_size {hidden_size}: a bottleneck wider than the embedding saves "
            f"nothing; choose a rank of at most {hidden_size}",
        )
    return None


def settings_of(spec: AdapterSpec, declared_in: type[AdapterSpec] = AdapterSpec) -> dict[str, Any]:
    """The settings of ``spec`` by name, in order, without other fields of its class.

    Args:
        spec: a config, or a task of a manifest.
        declared_in: ``AdapterSpec``, or ``MethodSpec`` for all settings of a config.
    """
    return {name: getattr(spec, name) for name in declared_in.__struct_fields__}


def describe_settings(spec: AdapterSpec, declared_in: type[AdapterSpec] = AdapterSpec) -> dict[str, Any]:
    """``settings_of`` as JSON values."""
    settings: dict[str, Any] = msgspec.to_builtins(settings_of(spec, declared_in))
    return settings


def settings_at_default(spec: AdapterSpec) -> set[str]:
    """Names of the settings at their default."""
    return {name for name, default in _DEFAULTS.items() if getattr(spec, name) == default}


def rank_of(rank: Rank, modality: str) -> int:
    """The rank of one modality."""
    return rank[modality] if isinstance(rank, dict) else rank


def show_rank(rank: Rank) -> str:
    """A rank as text, as ``adalink train`` takes it: ``16``, or ``text=16,image=64``."""
    return show_setting(rank)


def show_setting(value: object) -> str:
    """A setting as text: ``text=16,image=64`` for one by modality, ``text,image`` for several names."""
    if isinstance(value, dict):
        return ",".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, msgspec.Struct):
        return msgspec.json.encode(value).decode()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fault_in_rank(rank: Rank, modalities: tuple[str, ...], may_be_0: bool, hidden_size: int | None) -> str | None:
    ranks = list(rank.values()) if isinstance(rank, dict) else [rank]
    least = 0 if may_be_0 and not isinstance(rank, dict) else 1
    if any(not _is_whole(width) or width < least for width in ranks):
        hint = "" if may_be_0 else "; 0 is for adapters with a soft prompt or a head"
        expected = f"a whole number of at least {least}" if hidden_size is None else f"{least} to {hidden_size}"
        return f"rank is {rank!r}, expected {expected}, or one for each modality{hint}"
    if isinstance(rank, dict) and rank.keys() != set(modalities):
        return (
            f"rank is for {', '.join(rank) or 'nothing'} and the modalities are {', '.join(modalities)}: expected one "
            "rank, or one for each modality"
        )
    return None


_DEFAULTS = {
    field.name: field.default for field in msgspec.structs.fields(MethodSpec) if field.default is not msgspec.NODEFAULT
}
