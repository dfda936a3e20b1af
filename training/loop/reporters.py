"""Services that draw the curves of a run as it goes: TensorBoard, and Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from adalink.runtime.errors import BackendUnavailableError, ConfigError
from adalink.training.loop.options import REPORTERS

if TYPE_CHECKING:
    from transformers import TrainerCallback


def check_reporter(name: str) -> None:
    """Check, before anything slow, that the package of a reporter is installed.

    Raises:
        ConfigError: there is no such reporter.
        BackendUnavailableError: its package is missing.
    """
    if name not in REPORTERS:
        raise ConfigError(f"report_to is {name!r}, expected one of {', '.join(REPORTERS)}")
    if name != "none" and find_spec(name) is None:
        raise BackendUnavailableError(
            f"--report-to {name} needs the package {name}, which is not installed: pip install {name}, or leave it out"
        )


def make_reporters(name: str, folder: Path) -> list[TrainerCallback]:
    """The Trainer's callbacks for a reporter; TensorBoard's files are in ``folder``."""
    if name == "none":
        return []
    from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

    if name == "wandb":
        return [WandbCallback()]
    board = TensorBoardCallback()
    board.logging_dir = str(folder)  # by default in the checkpoints, which are removed at the end
    return [board]


@contextmanager
def run_of_its_own(name: str) -> Iterator[None]:
    """End the run of Weights & Biases that the block begins: the next training of the process would go on in it."""
    if name != "wandb":
        yield
        return
    import wandb  # pyright: ignore[reportMissingImports]  # the user's own

    is_begun_here = wandb.run is None
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        if is_begun_here:
            wandb.finish(exit_code=exit_code)
