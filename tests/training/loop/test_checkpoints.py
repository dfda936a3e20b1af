"""What an error leaves of a training: what can be gone on with, and nothing else."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.studies import write_base

from adalink.runtime.errors import ConfigError, DataError, ModelError, WriteError
from adalink.training.loop.checkpoints import SEARCH_FILE, begin_checkpoints, removed_if_useless
from adalink.training.method.config import AdaLinkConfig
from adalink.training.settings import SearchSettings, TrainSettings

train_module = importlib.import_module("adalink.training.run")


@pytest.mark.parametrize(
    ("error", "has_search", "is_kept"),
    [
        (ModelError("it overflows"), False, False),
        (ModelError("it overflows"), True, True),
        (WriteError("the disk is full"), False, True),
        (KeyboardInterrupt(), False, True),
    ],
)
def test_a_folder_is_kept_for_what_is_in_it_or_can_still_come(
    tmp_path: Path, error: BaseException, has_search: bool, is_kept: bool
) -> None:
    folder = tmp_path / "out.checkpoints"
    begin_checkpoints(folder, {"base": "tiny"})
    if has_search:
        (folder / SEARCH_FILE).write_text("{}")
    with pytest.raises(type(error)), removed_if_useless(folder):
        raise error
    assert folder.exists() is is_kept


@pytest.mark.parametrize("error", [ConfigError("all diverged"), DataError("too few rows")])
def test_a_search_without_a_winner_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Its trials lie in the folder, and would end in the same way."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": letter * 3, "completion": letter}) for letter in "abc"))
    folder = tmp_path / "out.checkpoints"

    def fail(*arguments: Any, **options: Any) -> None:
        (folder / SEARCH_FILE).write_text("{}")
        raise error

    monkeypatch.setattr(train_module, "search", fail)
    settings = TrainSettings(max_steps=2, batch_size=2, max_length=24, device="cpu")
    with pytest.raises(type(error)):
        train_module.train(
            write_base(tmp_path / "tiny"), rows, rows, tmp_path / "out", AdaLinkConfig(rank=4), settings,
            space=SearchSettings(minutes=1),
        )  # fmt: skip
    assert not folder.exists()
    assert not (tmp_path / "out").exists()
