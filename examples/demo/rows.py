"""The demo's rows: those that it shows, and the test rows that it measures accuracy on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from adalink.runtime.errors import DataError
from adalink.tools.commands.run import read_rows
from examples import make_data

if TYPE_CHECKING:
    from adalink.training.data.rows import TrainingRow


class DemoRow(NamedTuple):
    """A prompt, the task that it was written for, and the answer that is expected."""

    prompt: str
    task: str
    expected: str


def read_demo_rows(path: Path) -> list[DemoRow]:
    """Read rows ``{"prompt", "task", "expected"}``; raises ``DataError`` for a row that lacks one of them.

    ``adalink run --jsonl`` takes the same file; ``expected`` is a field that it does not read.
    """
    rows = read_rows(path, None)
    lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    demo_rows = []
    for row, line in zip(rows, lines, strict=True):
        expected = json.loads(line).get("expected")
        if row.task is None or not isinstance(expected, str):
            raise DataError(f"{row.origin}: a row of the demo names its task and its expected answer")
        demo_rows.append(DemoRow(row.prompt, row.task, expected))
    return demo_rows


def draw_test_rows(task: str) -> list[TrainingRow]:
    """The first test rows that ``examples.make_data.draw`` draws, of the data that the task was trained on.

    Raises:
        DataError: the package with the data is not installed, or no data of this task are known.
    """
    from adalink.training.data.rows import TrainingRow

    if task not in make_data.TASKS:
        raise DataError(f"no test rows of this task are known; they are of {', '.join(make_data.TASKS)}")
    rows = make_data.draw(make_data.TASKS[task]()["test"], make_data.DEMO_ROWS)
    return [TrainingRow(row["prompt"], row["completion"]) for row in rows]
