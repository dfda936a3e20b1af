"""Options of ``adalink train`` as the settings that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adalink.runtime.errors import ConfigError
from adalink.runtime.rows.source import RowSource
from adalink.runtime.storage.label_spec import LabelSet
from adalink.tools.command_line.head_options import HEAD_PARAMETERS
from adalink.tools.command_line.json_output import JsonOutput
from adalink.tools.command_line.options import is_given, is_typed
from adalink.tools.command_line.rank_option import read_rank
from adalink.training.data.labelled_rows import has_labels
from adalink.training.method.config import AdaLinkConfig, Init
from adalink.training.models.hub_access import HubAccess
from adalink.training.settings import RATES, SEARCHED_INIT, HeadSettings, SearchSettings, TrainSettings

# The settings of the method where no option says otherwise.
METHOD = AdaLinkConfig()


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of ``adalink train``, by the names of its parameters.

    Attributes:
        base: model folder, GGUF file or hub id, which ``access`` is for.
        data: rows to learn from.
        eval_data: rows to measure on; ``None`` to hold some of ``data`` out.
        columns: names of the rows' columns, as ``NAME=COLUMN,...``.
        template: how a prompt is made of columns.
        out: the adapter folder.
        ranks: one number, or ``MODALITY=NUMBER`` for each modality.
        modalities: what is adapted; text alone if none is named.
        init: how the bottleneck starts; ``None`` where it was left open, as ``lr``.
        minutes: time of a search; ``None`` for none.
        pooling: of a task with labels, as the four that follow: see ``HeadSettings``.
        assume_pretokenizer: see ``load_tokenizer``.
        resume: go on with an interrupted run.
        output: where the whole report goes as JSON.

    The others are fields of ``AdaLinkConfig`` and ``TrainSettings``, where they are described and checked.
    """

    base: str
    access: HubAccess
    data: Path
    eval_data: Path | None
    columns: tuple[str, ...]
    template: str | None
    out: Path
    ranks: tuple[str, ...]
    activation: str
    modalities: tuple[str, ...]
    bias: bool
    dropout: float
    scope: str
    soft_tokens: int
    init: Init | None
    lr: float | None
    max_steps: int
    batch_size: int
    max_length: int
    save_steps: int
    eval_steps: int | None
    early_stopping: int | None
    report_to: str
    seed: int
    device: str
    precision: str
    minutes: float | None
    labels: tuple[str, ...]
    pooling: str | None
    problem_type: str | None
    head_kind: str
    head_lr: float
    head_init: str
    head_alone: bool
    assume_pretokenizer: str | None
    resume: bool
    output: JsonOutput

    def method(self) -> AdaLinkConfig:
        """The settings of the method; raises ``ConfigError``."""
        rank = read_rank(self.ranks)
        init = self.init
        if init is None:  # without a bottleneck there is nothing to start
            searched = self.minutes is not None and self.lr is None and rank != 0
            init = SEARCHED_INIT if searched else METHOD.init
        return AdaLinkConfig(
            rank=rank,
            activation=self.activation,
            bias=self.bias,
            dropout=self.dropout,
            scope=self.scope,
            soft_tokens=self.soft_tokens,
            modalities=self.modalities or METHOD.modalities,
            init=init,
            labels=LabelSet(completions=self.labels) if self.labels else None,
        )

    def training(self, config: AdaLinkConfig) -> TrainSettings:
        """How to train; the rate that is left open is the best known for the init. Raises ``ConfigError``."""
        return TrainSettings(
            lr=RATES[config.init][0] if self.lr is None else self.lr,
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            seed=self.seed,
            device=self.device,
            precision=self.precision,
            save_steps=self.save_steps,
            eval_steps=self.eval_steps,
            early_stopping=self.early_stopping,
        )

    def head(self, source: RowSource) -> HeadSettings | None:
        """Settings of a task with labels; ``None`` where no option asks for one. Raises ``AdaLinkError``."""
        if not any(map(is_given, HEAD_PARAMETERS)):
            return None
        if not any(map(is_typed, HEAD_PARAMETERS)) and (source.template is not None or not has_labels(source)):
            return None  # a default for all trainings asks for no labels
        return HeadSettings(
            problem_type=self.problem_type,
            pooling=self.pooling,
            kind=self.head_kind,
            lr=self.head_lr,
            init=self.head_init,
            alone=self.head_alone,
        )

    def search(self, config: AdaLinkConfig) -> SearchSettings | None:
        """What a search may choose from: all that the command line leaves open. Raises ``ConfigError``."""
        if self.minutes is None:
            return None
        if isinstance(config.rank, dict):
            raise ConfigError(
                f"--rank is {' '.join(self.ranks)}, and --search takes one rank for all: give one, or none"
            )
        fixed: dict[str, Any] = {"rates": RATES[config.init] if self.lr is None else (self.lr,)}
        if is_given("ranks"):
            fixed["ranks"] = (config.rank,)
        if is_given("activation") or config.rank == 0:
            fixed["activations"] = (self.activation,)
        return SearchSettings(minutes=self.minutes, **fixed)
