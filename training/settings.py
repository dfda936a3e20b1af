"""Settings of a training run, which are not part of the adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.head_spec import PROBLEM_TYPES
from adalink.runtime.storage.pooling_schema import POOLING_MODES

if TYPE_CHECKING:
    from adalink.training.method.config import Init

DEVICES = ("auto", "cpu", "cuda")
HEADS = ("linear", "none")
HEAD_INITS = ("probe", "zeros")
PRECISIONS = ("float32", "bfloat16")
# Learning rates to try for each init, the best one at rank 64 first, and the best init for a searched rate.
# Measured: docs/concepts/when-it-is-enough.md.
RATES: dict[Init, tuple[float, ...]] = {
    "kaiming": (3e-3, 1e-2, 1e-3, 3e-2),
    "centered": (3e-4, 1e-3, 1e-4, 3e-3),
    "gradient": (1e-3, 3e-3, 1e-2, 3e-2),
}
SEARCHED_INIT: Init = "gradient"
_CURVE_POINTS = 5


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a training run, checked when made.

    Attributes:
        lr: peak learning rate, after a short warm-up; it decays linearly to 0.
        max_steps: optimizer steps.
        batch_size: rows a step.
        max_length: maximum tokens of a row, end token included.
        seed: seed of the initial weights, the order of rows and dropout.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        precision: precision of the products in a step: ``"float32"``, or ``"bfloat16"`` by autocast. Weights, the
            adapter's own arithmetic, the loss, the optimizer state and all measurements are float32 in both.
        save_steps: steps between checkpoints.
        eval_steps: steps between two points of the evaluation curve, 0 for none; by default a fifth of ``max_steps``.
            It does not change the adapter.
        early_stopping: evaluations without a lower loss after which the run ends. The adapter is then the best of all
            evaluations, on a tenth of the training rows, which are not learned. ``None`` for all steps and all rows.

    Raises:
        ConfigError: a setting is out of range.
    """

    lr: float = RATES["kaiming"][0]
    max_steps: int = 200
    batch_size: int = 8
    max_length: int = 256
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    save_steps: int = 50
    eval_steps: int | None = None
    early_stopping: int | None = None

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
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.eval_steps is not None and self.eval_steps < 0:
            raise ConfigError(f"eval_steps is {self.eval_steps!r}, expected at least 0")
        if self.early_stopping is not None and (self.early_stopping < 1 or self.eval_steps == 0):
            raise ConfigError(
                f"early_stopping is {self.early_stopping!r} with eval_steps {self.eval_steps!r}, expected at least 1, "
                "and evaluations to stop by"
            )

    @property
    def curve_steps(self) -> int:
        """Steps between two points of the evaluation curve; 0 for none."""
        return max(1, self.max_steps // _CURVE_POINTS) if self.eval_steps is None else self.eval_steps

    def as_record(self) -> dict[str, Any]:
        """All settings by name, for reports and checkpoints; those of evaluations only where they are given."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("eval_steps", "early_stopping") or value is not None
        }


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Search space and time of the search that ``train`` runs first.

    If the time is too short for all combinations, the first ones are tried: all rates of the first rank and activation,
    then those of the next rank, then the next activation.

    Attributes:
        minutes: time for the search alone.
        rates: learning rates.
        ranks: widths of the bottleneck; those wider than the embedding are left out.
        activations: activations of ``adalink.runtime.storage.adapter.ACTIVATIONS``.

    Raises:
        ConfigError: there is no time, or only one combination.
    """

    minutes: float
    rates: tuple[float, ...] = RATES["kaiming"]
    ranks: tuple[int, ...] = (64, 16, 256, 4)
    activations: tuple[str, ...] = ("identity", "gelu")

    def __post_init__(self) -> None:
        if not 0.0 < self.minutes < float("inf"):
            raise ConfigError(f"search minutes are {self.minutes!r}, expected more than 0")
        if len(set(self.rates)) * len(set(self.ranks)) * len(set(self.activations)) < 2:
            raise ConfigError(
                "a search was asked for and nothing is left to choose: leave out at least one of --lr, --rank and "
                "--activation, or --search"
            )


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """Settings of a task with labels, beside those of the method and of the run.

    Attributes:
        problem_type: one of ``adalink.runtime.storage.head_spec.PROBLEM_TYPES``; by default what the rows look like.
        pooling: one of ``adalink.runtime.storage.pooling_schema.POOLING_MODES``; by default what the base's own
            sentence-transformers files say, else the mean.
        kind: ``"linear"``, a head that is trained; or ``"none"``, the label whose text the base embeds nearest.
        lr: peak learning rate of the head.
        alone: whether the head is trained alone, on the states of the unchanged base: rank 0.
        init: where a linear head starts: ``"probe"``, fitted to the unchanged base's states
            (``adalink.training.heads.linear_probe``), or ``"zeros"``.

    Raises:
        ConfigError: a setting is out of range.
    """

    problem_type: str | None = None
    pooling: str | None = None
    kind: str = "linear"
    lr: float = 1e-2
    alone: bool = False
    init: str = "probe"

    def __post_init__(self) -> None:
        settings = (
            ("problem_type", self.problem_type, (None, *PROBLEM_TYPES)),
            ("pooling", self.pooling, (None, *POOLING_MODES)),
            ("head", self.kind, HEADS),
            ("init of the head", self.init, HEAD_INITS),
        )
        for name, value, known in settings:
            if value not in known:
                raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(filter(None, known))}")
        if not 0.0 < self.lr < 1.0:
            raise ConfigError(f"lr of the head is {self.lr!r}, expected more than 0 and less than 1")

    def as_record(self) -> dict[str, Any]:
        """What decides the head's weights, by name, for reports and checkpoints."""
        return {"head": self.kind, "head_lr": self.lr, "head_init": self.init}
