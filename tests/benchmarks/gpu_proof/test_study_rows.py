"""Learning rates of a study in one batch: the losses are those of the study's own code, one configuration at a time."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.studies import write_base

from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from benchmarks.gpu_proof.steps.cells import Cell
from benchmarks.gpu_proof.steps.study_rows import (
    Together,
    group_losses,
    in_groups,
    make_adapters,
    tiny_data,
    train_together,
)
from studies.experiment.methods import Tuned
from studies.experiment.run import LoadedBase, open_base
from studies.experiment.scoring import TextToText

CELLS = [Cell("a", 4, "identity", 1e-2), Cell("b", 8, "gelu", 3e-2), Cell("c", 4, "identity", 1e-4)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    loaded = open_base(str(write_base(tmp_path_factory.mktemp("base"))))
    loaded.model.requires_grad_(False)
    return loaded


def train(loaded: LoadedBase, cells: list[Cell], steps: int) -> TextToText:
    adapters = make_adapters(loaded.model, cells)
    task = TextToText(Together(loaded.model, adapters), loaded.tokenizer, tiny_data())
    done = train_together(task, [cell.lr for cell in cells], tiny_data().train, steps, time.monotonic() + 60)
    assert done == steps
    return task


def test_each_adapter_learns_what_it_learns_alone(loaded: LoadedBase) -> None:
    together = train(loaded, CELLS, 5)
    for index, cell in enumerate(CELLS):
        (alone,) = train(loaded, [cell], 5).tuned.group
        for name, weight in together.tuned.group[index].state_dict().items():
            torch.testing.assert_close(weight, alone.state_dict()[name], rtol=1e-3, atol=1e-5)
        assert together.tuned.group[index].up.weight.abs().max() > 0


def test_a_loss_is_that_of_the_study(loaded: LoadedBase) -> None:
    """The study's own task, with the adapter attached by the kit's hooks."""
    task, data = train(loaded, CELLS, 5), tiny_data()
    batch = task.collate(data.train[:6])
    found = group_losses(task, batch, len(CELLS)).detach()
    for index, cell in enumerate(CELLS):
        model: Any = copy.deepcopy(loaded.model)
        attached = attach(model, AdaLinkConfig(rank=cell.rank, activation=cell.activation))
        attached.adapters["text"].load_state_dict(task.tuned.group[index].state_dict())
        study = TextToText(Tuned(model, attached.adapters, attached=attached), loaded.tokenizer, data)
        with torch.no_grad():
            torch.testing.assert_close(found[index], study(**batch)["loss"])
    assert len({round(float(loss), 4) for loss in found}) == len(CELLS)


def test_too_little_memory_halves_the_groups() -> None:
    tried = []

    def train(cells: list[Cell], ends_at: float) -> tuple[Any, int]:
        tried.append(len(cells))
        if len(cells) > 2:
            raise torch.OutOfMemoryError("planted")
        return None, 7

    cells = [Cell(str(number), 4, "identity", 1e-3) for number in range(7)]
    groups = in_groups(cells, train, time.monotonic() + 10)
    assert [cell for group, *_ in groups for cell in group] == cells
    assert max(len(group) for group, *_ in groups) == 2
    assert tried[0] == 7


def test_one_that_does_not_fit_alone_is_an_error() -> None:
    def train(cells: list[Cell], ends_at: float) -> tuple[Any, int]:
        raise torch.OutOfMemoryError("planted")

    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        in_groups(CELLS, train, time.monotonic() + 10)


def test_the_clock_ends_a_training(loaded: LoadedBase, tmp_path: Path) -> None:
    task = TextToText(Together(loaded.model, make_adapters(loaded.model, CELLS)), loaded.tokenizer, tiny_data())
    assert train_together(task, [1e-3] * 3, tiny_data().train, 1000, time.monotonic() - 1) == 0
