"""Reports of evaluations of every kind, made of seeded answers."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TOKENS
from adalink.tools.evaluation.answers import Answers
from adalink.tools.evaluation.compare import against_base, against_constant
from adalink.tools.evaluation.report import CurvePoint, Report, Speed, TrainingCurves
from adalink.tools.evaluation.rows import TEXT, Answer, EvalRow
from adalink.tools.evaluation.task_report import make_task_report
from adalink.tools.evaluation.verdict import sum_up

KINDS = (SINGLE_LABEL, MULTI_LABEL, REGRESSION, TOKENS, TEXT, "trained", "variants")
_NAMES = ("earnings", "acquisitions", "crude oil", "grain", "interest rates", "shipping")
_LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"
_TEXT = "Crude oil prices rose again after producers cut their output, and traders expect more. "


def make_report(kind: str, *, long: bool = False) -> Report:
    """A report on 120 rows; ``long`` for labels, texts and names that are hard to fit in."""
    rng = np.random.default_rng(0)
    names = [*_NAMES, *([_LONG, "W" * 60] if long else [])]
    texts = [f"{_TEXT * (8 if long else 1)}{number} {'x' * 300 if long else ''}" for number in range(120)]
    kinds = {"trained": TEXT, "variants": SINGLE_LABEL}
    real = kinds.get(kind, kind)
    expected = [_answer(real, rng, names) for _ in texts]
    given = [one if rng.random() < 0.8 else _answer(real, rng, names) for one in expected]
    if real == REGRESSION:
        given = [Answer(value=one.value + float(rng.normal()) * 0.2) for one in expected]
    rows = [EvalRow(text, one, line) for line, (text, one) in enumerate(zip(texts, expected, strict=True), start=1)]
    right = np.array([one == other for one, other in zip(expected, given, strict=True)])
    confidence = 0.3 + 0.7 * rng.random(120) if real == SINGLE_LABEL else None
    speed = Speed(median_ms=12.3, p95_ms=45.6, rows_per_second=78.9, tokens_per_second=1234.5)
    answers = Answers(given, right, confidence, cut=3, speed=None if kind == "trained" else speed)
    base = Answers(given, rng.random(120) < 0.3)
    reference = against_base(answers, base) if real == TEXT else against_constant(real, rows, answers)
    known = names if kind == "trained" else ()
    name = _LONG if long else "topics"
    task = make_task_report(name, "onnxruntime-cpu", real, rows, answers, reference, known=known)
    tasks = [task, replace(task, variant="int4")] if kind == "variants" else [task]
    return Report(
        verdict=sum_up(tasks),
        base="SmolLM2-135M-Instruct",
        data=f"{_LONG if long else 'rows'}.jsonl",
        data_sha256=f"sha256:{'0' * 64}",
        kit_version="0.2.0",
        tasks=tasks,
        training=_curves() if kind == "trained" else None,
    )


def _answer(kind: str, rng: np.random.Generator, names: list[str]) -> Answer:
    if kind == REGRESSION:
        return Answer(value=float(rng.normal()))
    if kind == MULTI_LABEL:
        return Answer(items=frozenset(name for name in names if rng.random() < 0.3))
    if kind == TOKENS:
        spans = [(0, 9, names[0]), (10, 16, names[1]), (30, 39, names[-1])]
        return Answer(items=frozenset(span for span in spans if rng.random() < 0.6))
    return Answer(names[int(rng.integers(len(names)))])


def _curves() -> TrainingCurves:
    def points(first: float, every: int) -> list[CurvePoint]:
        return [CurvePoint(step=step, value=first / (1 + step / 40)) for step in range(every, 201, every)]

    return TrainingCurves(
        loss=points(2.5, 10),
        eval_loss=points(2.7, 40),
        eval_rows="validation rows",
        measure="accuracy",
        eval_measure=[CurvePoint(step=step, value=0.5 + step / 500) for step in range(40, 201, 40)],
        best_step=160,
    )
