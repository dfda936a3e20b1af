"""How to train: the settings of a run, which are no part of the adapter."""

from __future__ import annotations

from dataclasses import dataclass

from adalink.runtime.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a training run, checked when made.

    Attributes:
        lr: highest learning rate, reached after a short warm-up and lowered linearly to 0.
        max_steps: optimizer steps.
        batch_size: rows a step.
        max_length: most tokens of a row, end token included.
        seed: seed of the initial weights, the order of rows and dropout.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        save_steps: steps between checkpoints.

    Raises:
        ConfigError: a setting is out of range.
    """

    lr: float = 3e-3
    max_steps: int = 200
    batch_size: int = 8
    max_length: int = 256
    seed: int = 0
    device: str = "auto"
    save_steps: int = 50

    def __post_init__(self) -> None:
        if not 0.0 < self.lr < 1.0:
            raise ConfigError(f"lr is {self.lr!r}, expected more than 0 and less than 1")
        for name in ("max_steps", "batch_size", "max_length", "save_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected at least 1")
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"seed is {self.seed!r}, expected 0 to {(1 << 32) - 1}")
        if self.device not in DEVICES:
            raise ConfigError(f"device is {self.device!r}, expected one of {', '.join(DEVICES)}")
