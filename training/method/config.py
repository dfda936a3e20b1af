"""``AdaLinkConfig``: settings of the method, chosen before training."""

from __future__ import annotations

from typing import Any, Literal, get_args

from msgspec import structs, to_builtins

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.adapter_spec import MethodSpec, Rank

Init = Literal["kaiming", "centered", "gradient"]
INITS: tuple[Init, ...] = get_args(Init)


class AdaLinkConfig(MethodSpec, frozen=True, kw_only=True):
    """Settings of an adapter to train, checked when made; by keyword alone.

    ``adalink.runtime.storage.adapter_spec`` documents the settings of the method. Here each has a default, and training
    adds its own settings.

    Attributes:
        dropout: dropout probability of bottleneck features in training, in ``[0, 1)``; 0 for rank 0.
        init: initialization of ``down``: ``"kaiming"``, uniform within ``1 / sqrt(d)``; ``"centered"`` on the base's
            embeddings, for the modality ``text``; or ``"gradient"``, from the training rows, which ``train`` computes
            (``adalink.training.method.initialization``). ``up`` starts at zero.

    Raises:
        ConfigError: a setting is outside what the method allows, or cannot be trained.
    """

    rank: Rank = 64
    activation: str = "identity"
    bias: bool = False
    scope: str = "all"
    modalities: tuple[str, ...] = ("text",)
    dropout: float = 0.0
    init: Init = "kaiming"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input != "embeddings":
            raise ConfigError(f"input is {self.input!r}, expected 'embeddings': no table of token ids is trained here")
        if self.weight_dtype != "float32" or self.nested:
            raise ConfigError(
                f"weight_dtype is {self.weight_dtype!r} and nested {self.nested}, expected 'float32' and false: train "
                "first, and make the adapter smaller afterwards, with adalink compress"
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

    def as_record(self) -> dict[str, Any]:
        """All settings by name, for reports; head and labels only if there are some."""
        record = {name: value for name, value in structs.asdict(self).items() if name != "input"}
        parts = {name: record.pop(name) for name in ("head", "labels")}
        return record | {name: to_builtins(part) for name, part in parts.items() if part is not None}
