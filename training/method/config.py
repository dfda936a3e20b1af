"""What one chooses before training: the settings of the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.adapter import Rank, check_method

Init = Literal["kaiming", "centered", "gradient"]
INITS: tuple[Init, ...] = get_args(Init)


@dataclass(frozen=True)
class AdaLinkConfig:
    """Settings of an adapter, checked when made.

    Attributes:
        rank: width ``r`` of the bottleneck, or of each modality's: ``{"text": 16, "image": 64}``; 0 for a soft prompt
            alone, with activation ``identity``, no bias and no dropout.
        activation: one of ``adalink.runtime.storage.adapter.ACTIVATIONS``; ``gelu`` is the exact erf form.
        bias: whether ``down`` and ``up`` carry a bias.
        dropout: chance in ``[0, 1)`` that a bottleneck feature is dropped in training.
        modalities: names of the adapted modalities; each gets its own weights.
        scope: ``"all"`` adapts every position, ``"prompt"`` leaves generated and target tokens unadapted.
        soft_tokens: trained vectors before a row's first token.
        init: how ``down`` starts: ``"kaiming"``, uniform within ``1 / sqrt(d)``; for the modality ``text``
            ``"centered"`` on the base's embeddings; or ``"gradient"``, from the rows that are learned from, once
            ``train`` has attached it (``adalink.training.method.initialization``). ``up`` starts at zero.

    Raises:
        ConfigError: a setting is outside what the method allows.
    """

    rank: Rank = 64
    activation: str = "identity"
    bias: bool = False
    dropout: float = 0.0
    modalities: tuple[str, ...] = ("text",)
    scope: str = "all"
    soft_tokens: int = 0
    init: Init = "kaiming"

    def __post_init__(self) -> None:
        check_method(self.rank, self.activation, self.modalities, self.scope, self.soft_tokens)
        if self.rank == 0 and (self.activation != "identity" or self.bias):
            raise ConfigError(
                f"rank is 0 with activation {self.activation!r} and bias {self.bias}: a soft prompt alone has "
                "activation 'identity' and no bias"
            )
        if self.init not in INITS:
            raise ConfigError(f"init is {self.init!r}, expected one of {', '.join(INITS)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is {self.dropout!r}, expected a chance of at least 0 and less than 1")
        if self.rank == 0 and self.dropout:
            raise ConfigError(
                f"rank is 0 with dropout {self.dropout}: a soft prompt alone has no bottleneck to drop features of; "
                "leave the dropout out"
            )
        if self.init != "kaiming" and self.rank == 0:
            raise ConfigError(
                f"rank is 0 with init {self.init!r}: a soft prompt alone has no bottleneck to start; leave the init out"
            )
        if self.init == "centered" and "text" not in self.modalities:
            raise ConfigError(
                f"init is 'centered' and the modalities are {', '.join(self.modalities)}: only tokens have a "
                "vocabulary to center on; choose another init"
            )
