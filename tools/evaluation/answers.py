"""Answers of a task to rows, with the time that they took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from adalink.runtime.errors import DataError, RequestError
from adalink.runtime.sampling.sampler import SamplingParams
from adalink.runtime.storage.head_spec import SINGLE_LABEL, TOKENS
from adalink.tools.evaluation.metrics import Flags, Numbers
from adalink.tools.evaluation.report import Speed
from adalink.tools.evaluation.rows import TEXT, Answer, EvalRow

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment
    from adalink.runtime.storage.adapter_spec import AdapterSpec
    from adalink.runtime.storage.manifest import Base
    from adalink.runtime.text_classifier import Classification

Progress = Callable[[str, "float | None"], None]

# Rows between two lines of progress; rows that are also run alone, for the latency.
_AT_ONCE, _ALONE = 64, 30
_GREEDY = SamplingParams(temperature=0, base_defaults=False)


@dataclass(frozen=True)
class Answers:
    """Answers to rows.

    Attributes:
        given: the answer to each row.
        right: whether it is right; of numbers, whether it is exactly the row's.
        confidence: probability of each label; ``None`` for other answers.
        cut: texts that were cut.
        speed: how fast they came; ``None`` where that says nothing.
    """

    given: list[Answer]
    right: Flags
    confidence: Numbers | None = None
    cut: int = 0
    speed: Speed | None = None


def kind_of(base: Base, settings: AdapterSpec, task: str) -> tuple[str, tuple[str, ...]]:
    """What a task gives, as in ``TaskReport``, and the names of its labels.

    Args:
        base: its base.
        settings: its settings.
        task: its name, for messages.

    Raises:
        RequestError: it has no head.
    """
    if settings.head is not None:
        labels = settings.head.labels
        kind = settings.head.problem_type
        return kind, tuple(label[2:] for label in labels if label.startswith("B-")) if kind == TOKENS else labels
    if settings.labels is not None:
        return SINGLE_LABEL, settings.labels.names
    if base.kind == "encoder":
        raise RequestError(f"task {task!r} has no head: train it on rows with labels to evaluate it")
    return TEXT, ()


def check_labels(rows: Sequence[EvalRow], kind: str, labels: Sequence[str], task: str, origin: object) -> None:
    """Check that a task can be right on every row; raises ``DataError``."""
    known = set(labels)
    for row in rows:
        items = row.expected.items
        names = [item if isinstance(item, str) else item[2] for item in items]
        for label in sorted(names) if kind != SINGLE_LABEL else [row.expected.text]:
            if label not in known:
                raise DataError(
                    f"{origin}:{row.line}: label {label!r:.80} is none of task {task!r}, which has "
                    f"{', '.join(labels):.200}: correct the row, or train the task with such rows"
                )


def classify_rows(
    deployment: Deployment,
    rows: Sequence[EvalRow],
    task: str | None,
    progress: Progress,
    *,
    labels: Sequence[str] | None = None,
    calibration: str | None = None,
) -> Answers:
    """What a classifier says of rows; ``labels`` and ``calibration`` as ``Deployment.classify`` takes them."""
    texts = [row.text if row.text_pair is None else (row.text, row.text_pair) for row in rows]
    classifier = deployment.text_classifier
    classifier.prepare(texts, task, labels, calibration)  # every row is checked before the first is run
    start, results = time.perf_counter(), []
    for first in range(0, len(texts), _AT_ONCE):
        progress(f"answering with {task or 'the base'}: {first} of {len(texts)} rows", first / len(texts))
        results += classifier.classify(texts[first : first + _AT_ONCE], task, labels, calibration)
    seconds = time.perf_counter() - start
    tokens = sum(result.tokens for result in results)
    one = partial(deployment.classify, tasks=task, labels=labels, calibration=calibration)
    alone = [_milliseconds(partial(one, [text])) for text in texts[:_ALONE]]
    return answers_of(rows, results, _speed(alone, seconds, len(rows), tokens))


def answers_of(rows: Sequence[EvalRow], said: Sequence[Classification], speed: Speed | None = None) -> Answers:
    """Classifications of rows as answers."""
    given = [_answer(one) for one in said]
    confidence = None
    if all(one.label is not None for one in said):
        confidence = np.array([one.probabilities[one.label or ""] for one in said])
    right = np.array([answer == row.expected for answer, row in zip(given, rows, strict=True)])
    return Answers(given, right, confidence, sum(one.truncated for one in said), speed)


def _answer(said: Classification) -> Answer:
    if said.value is not None:
        return Answer(value=said.value)
    if said.label is not None:
        return Answer(said.label)
    if said.probabilities:
        return Answer(items=frozenset(said.labels))
    return Answer(items=frozenset((span.start, span.end, span.label) for span in said.spans))


def generate_rows(deployment: Deployment, rows: Sequence[EvalRow], task: str | None, progress: Progress) -> Answers:
    """Greedy text for rows: right if it is the completion, spaces at its ends aside, and ends there."""
    limit = 1 + max(len(deployment.tokenizer.encode_plain(row.completion)) for row in rows)
    for row in rows:
        ids = deployment.encode_prompt(row.text, task)
        deployment.check_prompt(ids, row.images, task=task, max_new_tokens=limit)

    def generate(some: Sequence[EvalRow]) -> list[tuple[str, bool, int]]:
        images = [list(row.images) or None for row in some] if any(row.images for row in some) else None
        made = deployment.generate(
            [row.text for row in some], tasks=task, images=images, max_new_tokens=limit, sampling=_GREEDY, stop=[]
        )
        return [(one.text, one.finish_reason == "stop", one.prompt_tokens + len(one.token_ids)) for one in made]

    start, results = time.perf_counter(), []
    for first in range(0, len(rows), _AT_ONCE):
        progress(f"answering with {task or 'the base'}: {first} of {len(rows)} rows", first / len(rows))
        results += generate(rows[first : first + _AT_ONCE])
    seconds = time.perf_counter() - start
    alone = [_milliseconds(partial(generate, [row])) for row in rows[:_ALONE]]
    given = [Answer(text.strip()) for text, _, _ in results]
    right = [ends and answer == row.expected for answer, (_, ends, _), row in zip(given, results, rows, strict=True)]
    tokens = sum(count for _, _, count in results)
    return Answers(given, np.array(right), speed=_speed(alone, seconds, len(rows), tokens))


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def _speed(alone: Sequence[float], seconds: float, rows: int, tokens: int) -> Speed:
    median, high = np.quantile(alone, [0.5, 0.95])
    return Speed(
        median_ms=float(median), p95_ms=float(high), rows_per_second=rows / seconds, tokens_per_second=tokens / seconds
    )
