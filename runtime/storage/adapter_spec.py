"""The settings of an adapter: declared, checked and told to others here alone.

The config of an adapter folder, a task of a manifest and ``AdaLinkConfig`` inherit ``AdapterSpec``. The metadata of a
task graph, ``adalink inspect`` and the parity checks read it. A new setting is one field with a default, and a rule in
``find_fault`` if some values are not allowed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from adalink.runtime.errors import ConfigError

ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "tanh")
# What the arithmetic of a task is called, whatever its weights: one bank graph each (docs/concepts/file-formats.md).
ACTIVATION_KEYS = tuple(f"{activation}{bias}" for activation in ACTIVATIONS for bias in ("", "_bias"))
SCOPES = ("all", "prompt")
INPUTS = ("embeddings", "ids")
# A soft prompt takes up positions of the model: far more of them than anybody trains would be a mistake.
MOST_SOFT_TOKENS = 4096

# Width of the bottleneck: of every modality, or of each by its name.
Rank = int | dict[str, int]


class AdapterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that everything says of an adapter: its config, a manifest, a task graph's metadata, reports.

    A setting without a default stands in every file. One with a default came to the formats later: where it is the
    default, it is left out of ``adapter_config.json`` and of metadata, so that digests and graphs stay as they were.

    Attributes:
        rank: width ``r`` of the bottleneck, or of each modality's: ``{"text": 16, "image": 64}``; 0 for a soft prompt
            alone.
        activation: one of ``ACTIVATIONS``; ``gelu`` is the exact erf form.
        scope: ``"all"`` adapts every position, ``"prompt"`` leaves generated and target tokens unadapted.
        modalities: names of the adapted modalities; each has its own weights.
        soft_tokens: vectors of the soft prompt, which stand before the first token and go through no bottleneck.
        input: what the bottleneck starts from: ``"embeddings"``, ``x + up(act(down(x)))``; or the token's ``"ids"``,
            ``x + up(table[id])``.
    """

    rank: Rank
    activation: str
    scope: str
    modalities: tuple[str, ...]
    soft_tokens: int = 0
    input: str = "embeddings"


class MethodSpec(AdapterSpec, frozen=True, kw_only=True):
    """All settings of the method, checked when made: those of ``AdapterSpec``, and what the manifest does not say.

    Attributes:
        bias: whether ``down`` and ``up`` carry a bias.

    Raises:
        ConfigError: a setting is outside what the method allows.
    """

    bias: bool

    def __post_init__(self) -> None:
        if fault := find_fault(self):
            raise ConfigError(fault.message)
        is_empty = self.activation == "identity" and not self.bias
        if self.rank == 0 and not (is_empty and self.input == "embeddings"):
            raise ConfigError(
                f"rank is 0 with activation {self.activation!r}, bias {self.bias} and input {self.input!r}, expected "
                "'identity', no bias and input 'embeddings': a soft prompt alone has activation 'identity' and no bias"
            )
        if self.input == "ids" and not (is_empty and self.modalities == ("text",)):
            raise ConfigError(
                f"input is 'ids' with activation {self.activation!r}, bias {self.bias} and modalities "
                f"{self.modalities!r}: a table of token ids has activation 'identity', no bias and modalities ('text',)"
            )

    @property
    def activation_key(self) -> str:
        """Which of ``ACTIVATION_KEYS`` computes this adapter."""
        return f"{self.activation}_bias" if self.bias else self.activation


class Fault(NamedTuple):
    """A setting outside what the method allows: its name, and the whole message."""

    field: str
    message: str


def find_fault(spec: AdapterSpec, hidden_size: int | None = None) -> Fault | None:
    """The first setting that the method does not allow.

    Args:
        spec: what to look at.
        hidden_size: width of the base's embeddings, which no rank exceeds.
    """
    soft_tokens, rank, modalities = spec.soft_tokens, spec.rank, spec.modalities
    if not _is_whole(soft_tokens) or not 0 <= soft_tokens <= MOST_SOFT_TOKENS:
        expected = f"a whole number from 0 to {MOST_SOFT_TOKENS}"
        return Fault("soft_tokens", f"soft_tokens is {soft_tokens!r}, expected {expected}")
    if message := _fault_in_rank(rank, modalities, soft_tokens, hidden_size):
        return Fault("rank", message)
    for field, known in (("activation", ACTIVATIONS), ("scope", SCOPES), ("input", INPUTS)):
        if (value := getattr(spec, field)) not in known:
            return Fault(field, f"{field} is {value!r}, expected one of {', '.join(known)}")
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
    """The settings of ``spec`` by name, in their order, without what else its own class holds.

    Args:
        spec: a config, or a task of a manifest.
        declared_in: ``AdapterSpec``, or ``MethodSpec`` for all that a config holds.
    """
    return {name: getattr(spec, name) for name in declared_in.__struct_fields__}


def describe_settings(spec: AdapterSpec, declared_in: type[AdapterSpec] = AdapterSpec) -> dict[str, Any]:
    """``settings_of`` ready for JSON."""
    settings: dict[str, Any] = msgspec.to_builtins(settings_of(spec, declared_in))
    return settings


def settings_at_default(spec: AdapterSpec) -> set[str]:
    """Names of the settings that say nothing, since they are what an adapter is without them."""
    return {name for name, default in _DEFAULTS.items() if getattr(spec, name) == default}


def rank_of(rank: Rank, modality: str) -> int:
    """The rank of one modality."""
    return rank[modality] if isinstance(rank, dict) else rank


def show_rank(rank: Rank) -> str:
    """A rank for people and as ``adalink train`` takes it: ``16``, or ``text=16,image=64``."""
    return show_setting(rank)


def show_setting(value: object) -> str:
    """A setting as one text: ``text=16,image=64`` for one by modality, ``text,image`` for several names."""
    if isinstance(value, dict):
        return ",".join(f"{name}={item}" for name, item in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fault_in_rank(rank: Rank, modalities: tuple[str, ...], soft_tokens: int, hidden_size: int | None) -> str | None:
    ranks = list(rank.values()) if isinstance(rank, dict) else [rank]
    least = 0 if soft_tokens and not isinstance(rank, dict) else 1
    if any(not _is_whole(width) or width < least for width in ranks):
        hint = "" if soft_tokens else "; 0 is for adapters with a soft prompt"
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
