"""Classifiers of the demo: tasks of several kinds on one encoder, exported, asked, measured and verified."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adalink.runtime.errors import DataError, ModelError
from adalink.tools.terminal.console import print_table
from examples.classifiers.answers import deployed_f1, right_answers, said_answers
from examples.classifiers.base import find_minilm
from examples.classifiers.rows import TASKS, Row, make_rows
from examples.demo import Progress
from examples.demo.answers import shorten
from examples.demo.checks import show_parity
from examples.demo.export import export_all
from examples.demo.state import DemoState

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment

_ROWS = 128
# The table is 100 columns wide at most.
_TEXT_WIDTH, _ANSWER_WIDTH = 34, 24


def find_classifiers(examples: Path) -> list[Path]:
    """Adapter folders of the classifiers, sorted; none in a folder without them."""
    return sorted(path.parent for path in examples.glob("classifiers/adapters/*/adapter_config.json"))


def find_encoder(model: str | None) -> Path | None:
    """Folder of the encoder: ``model``, or MiniLM as its package installs it; ``None`` if that is not installed.

    Raises:
        ModelError: ``model`` is no folder.
    """
    if model is not None:
        if not Path(model).is_dir():
            raise ModelError(f"{model}: no such folder; the classifiers need a local encoder")
        return Path(model)
    try:
        return find_minilm()
    except ModelError as error:
        click.echo(f"Classifiers are not shown: {error}\n")
        return None


def show_classifiers(out: Path, source: Path, adapters: Sequence[Path], progress: Progress, *, fresh: bool) -> bool:
    """Export an encoder and its tasks into ``out``, classify test rows, and verify; returns whether parity passed.

    Args:
        out: folder of the deployment and of what was done before.
        source: folder of the encoder.
        adapters: folders of the tasks.
        progress: gets a line at each step.
        fresh: forget what an earlier run did.
    """
    from adalink.runtime.deployment import Deployment

    out.mkdir(parents=True, exist_ok=True)
    state, deployment = DemoState(out, source, fresh=fresh), out / "deployment"
    export_all(deployment, source, list(adapters), state, progress)
    progress("opening one encoder for all classifiers")
    with Deployment.open(deployment) as opened:
        show_labels(opened, progress)
    return show_parity(deployment, source, state, progress)


def show_labels(deployment: Deployment, progress: Progress) -> None:
    """Print an answer of each task, and its F1 over test rows; of a task without data, why not."""
    rows: dict[str, list[Row]] = {}
    for task in deployment.tasks:
        try:
            rows[task] = _test_rows(task)
        except DataError as error:
            click.echo(f"  {task}: not measured: {error}")
    if not rows:
        return
    firsts = [some[0] for some in rows.values()]
    said = deployment.classify([row["text"] for row in firsts], list(rows))
    print_table(
        "Classifiers on one encoder, the first test row of each, in one batch",
        ("task", "text", "expected", "answer"),
        [
            (
                task,
                shorten(row["text"], _TEXT_WIDTH),
                shorten(_shown(right_answers(row), row), _ANSWER_WIDTH),
                shorten(_shown(said_answers(one), row), _ANSWER_WIDTH),
            )
            for task, row, one in zip(rows, firsts, said, strict=True)
        ],
    )
    progress(f"classifying {_ROWS} test rows a task, in batches of mixed tasks")
    for task, value in deployed_f1(deployment, rows).items():
        click.echo(f"  {task} ({TASKS[task].kind}): F1 {100 * value:.1f} % over {len(rows[task])} test rows")
    click.echo("For one label F1 is the accuracy. examples/classifiers/README.md compares with LoRA and others.\n")


def _test_rows(task: str) -> list[Row]:
    """The first test rows of a task; raises ``DataError``."""
    if task not in TASKS:
        raise DataError(f"no test rows of this task are known; they are of {', '.join(TASKS)}")
    return make_rows(task, 0)["test"][:_ROWS]


def _shown(answers: set[Any], row: Row) -> str:
    """Answers as text; a span is its characters."""
    return ", ".join(sorted(one if isinstance(one, str) else row["text"][one[0] : one[1]] for one in answers))
