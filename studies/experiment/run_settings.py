"""The settings of one run: all that decides its outcome. Their digest names the run."""

from __future__ import annotations

from typing import Literal

import msgspec

from adalink.runtime.storage.digest import digest_bytes

FORMAT = 1  # of a run; another number where the same settings would no longer mean the same run


class Run(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that decides a run's outcome; its digest is the run's name.

    Attributes:
        purpose: ``"choose"`` is scored on validation and never sees test; ``"final"`` is scored on test.
        base: name of the base in the study.
        base_digest: digest of its weights and tokenizer.
        data: name of the data set.
        words: how many words of a text are kept.
        train_digest: digest of the rows learned from; empty where nothing is trained.
        scored_digest: digest of the rows scored.
        scored_rows: how many they are.
        method: the method's settings, without learning rates.
        size: rows learned from; ``None`` for all.
        lr: the learning rate; 0 where nothing is trained, as ``max_steps`` is.
        max_steps: optimizer steps.
        batch_size: rows a step.
        seed: seed of the subset, the initial weights and the order.
        device: ``"cpu"`` or ``"cuda"``.
        precision: of a training step, as in ``TrainSettings``.
        format: ``FORMAT``.
    """

    purpose: Literal["choose", "final"]
    base: str
    base_digest: str
    data: str
    words: int
    train_digest: str
    scored_digest: str
    scored_rows: int
    method: dict[str, str | int | float]
    size: int | None
    lr: float
    max_steps: int
    batch_size: int
    seed: int
    device: str
    precision: str = "float32"
    format: int = FORMAT

    @property
    def file_name(self) -> str:
        """Name of the finished run's file."""
        settings = msgspec.to_builtins(self)
        if self.precision == "float32":
            del settings["precision"]  # runs done before there was a choice keep their names
        digest = digest_bytes(msgspec.json.encode(settings, order="sorted")).removeprefix("sha256:")
        return f"{self.purpose}-{digest[:24]}.json"
