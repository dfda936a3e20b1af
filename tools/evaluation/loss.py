"""What a change of an adapter costs on rows: the share of right answers before and after, on one open deployment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adalink.runtime.errors import DataError
from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, TOKENS
from adalink.tools.evaluation.answers import Answers, Progress, classify_rows, generate_rows
from adalink.tools.evaluation.item_metrics import measure_items
from adalink.tools.evaluation.number_metrics import measure_numbers
from adalink.tools.evaluation.rows import TEXT, EvalRow

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment

_BEFORE, _AFTER = "before", "after"
MEASURES = {MULTI_LABEL: "F1", TOKENS: "F1", REGRESSION: "R2"}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What is lost.

    Attributes:
        measure: ``"accuracy"``, ``"F1"`` or ``"R2"``.
        rows: rows that were asked.
        same: rows whose answer is the same; of numbers, the same float.
        before: the measure of the adapter as it was, from 0 to 1.
        after: likewise of the changed one.
    """

    measure: str
    rows: int
    same: int
    before: float
    after: float

    @property
    def points(self) -> float:
        """How much the measure falls, in percentage points; less than 0 if it rises.

        Without the last digits, which are of float64: one row of 200 is half a point.
        """
        return round(100 * (self.before - self.after), 9)


def measure_loss(
    deployment: Deployment, before: Path, after: Path, kind: str, rows: Sequence[EvalRow], progress: Progress
) -> Loss:
    """Ask both adapters every row.

    Args:
        deployment: of their base; its folder is not changed.
        before: adapter folder.
        after: adapter folder of the changed adapter.
        kind: what they give: ``TEXT`` or a problem type of heads.
        rows: rows with right answers.
        progress: called as ``progress_bar`` says.

    Raises:
        ContractError: an adapter is of another base.
        DataError: the rows' numbers are all one, so that R2 is not defined.
    """
    answer = generate_rows if kind == TEXT else classify_rows
    answers = []
    for folder, name in ((before, _BEFORE), (after, _AFTER)):
        deployment.add_task(folder, name, replace=True)
        answers.append(answer(deployment, rows, name, progress))
        deployment.remove_task(name)
    old, new = answers
    return Loss(
        measure=MEASURES.get(kind, "accuracy"),
        rows=len(rows),
        same=sum(one == other for one, other in zip(old.given, new.given, strict=True)),
        before=_measure(kind, rows, old),
        after=_measure(kind, rows, new),
    )


def _measure(kind: str, rows: Sequence[EvalRow], answers: Answers) -> float:
    if kind in (MULTI_LABEL, TOKENS):
        return measure_items([row.expected.items for row in rows], [one.items for one in answers.given]).f1.value
    if kind == REGRESSION:
        numbers = measure_numbers([row.expected.value for row in rows], [one.value for one in answers.given])
        if numbers.r2 is None:
            raise DataError("the numbers of the rows are all one: give rows with different ones")
        return numbers.r2
    return float(answers.right.mean())
