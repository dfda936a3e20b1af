"""Answers of a task to rows, with the time that they took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from adalink.runtime.errors import DataError, RequestError
from adalink.runtime.generation.sampling import SamplingParams
from adalink.runtime.storage.head_spec import SINGLE_LABEL
from adalink.tools.evaluation.metrics import Numbers
from adalink.tools.evaluation.report import Speed
from adalink.tools.evaluation.rows import EvalRow

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment

Progress = Callable[[str, "float | None"], None]

# Rows between two lines of progress; rows that are also run alone, for the latency.
_AT_ONCE, _ALONE = 64, 30
_GREEDY = SamplingParams(temperature=0, base_defaults=False)


@dataclass(frozen=True)
class Answers:
    """Answers to rows.

    Attributes:
        given: the answer to each row: a label, or text.
        right: whether it is right.
        confidence: probability of each label; ``None`` for text.
        cut: texts that were cut.
        speed: how fast they came.
    """

    given: list[str]
    right: np.ndarray
    confidence: Numbers | None
    cut: int
    speed: Speed


def labels_of(deployment: Deployment, task: str) -> tuple[str, ...] | None:
    """Names of a task's labels; ``None`` for a task that gives text.

    Raises:
        RequestError: it labels parts of texts, gives numbers or several labels.
    """
    settings = deployment.manifest.tasks.get(task)
    if settings is None:
        known = ", ".join(deployment.tasks) or "none"
        raise RequestError(f"task {task!r} is not deployed; the deployment's tasks are: {known}")
    if settings.head is not None:
        if settings.head.problem_type != SINGLE_LABEL:
            raise RequestError(
                f"task {task!r} is of {settings.head.problem_type}, and one label or text is evaluated here: its "
                "training.json has its measures"
            )
        return settings.head.labels
    if settings.labels is not None:
        return settings.labels.names
    if deployment.manifest.base.kind == "encoder":
        raise RequestError(f"task {task!r} has no head: train it on rows with labels to evaluate it")
    return None


def check_labels(rows: Sequence[EvalRow], labels: Sequence[str], task: str, origin: object) -> None:
    """Check that a task can be right on every row; raises ``DataError``."""
    known = set(labels)
    for row in rows:
        if row.label not in known:
            raise DataError(
                f"{origin}:{row.line}: label {row.label!r:.80} is none of task {task!r}, which has "
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
    """Labels of rows; ``labels`` and ``calibration`` as ``Deployment.classify`` takes them."""
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
    given = [str(result.label) for result in results]
    return Answers(
        given,
        np.array([answer == row.label for answer, row in zip(given, rows, strict=True)]),
        np.array([result.probabilities[answer] for result, answer in zip(results, given, strict=True)]),
        sum(result.truncated for result in results),
        _speed(alone, seconds, len(rows), tokens),
    )


def generate_rows(deployment: Deployment, rows: Sequence[EvalRow], task: str | None, progress: Progress) -> Answers:
    """Greedy text for rows: right if it is the completion, spaces at its ends aside, and ends there."""
    prompts = [row.text for row in rows]
    limit = 1 + max(len(deployment.tokenizer.encode_plain(row.expected)) for row in rows)
    for prompt in prompts:
        deployment.check_prompt(deployment.tokenizer.encode(prompt), task=task, max_new_tokens=limit)

    def generate(some: list[str]) -> list[tuple[str, bool, int]]:
        made = deployment.generate(some, tasks=task, max_new_tokens=limit, sampling=_GREEDY, stop=[])
        return [(one.text, one.finish_reason == "stop", one.prompt_tokens + len(one.token_ids)) for one in made]

    start, results = time.perf_counter(), []
    for first in range(0, len(prompts), _AT_ONCE):
        progress(f"answering with {task or 'the base'}: {first} of {len(prompts)} rows", first / len(prompts))
        results += generate(prompts[first : first + _AT_ONCE])
    seconds = time.perf_counter() - start
    alone = [_milliseconds(partial(generate, [prompt])) for prompt in prompts[:_ALONE]]
    right = [ends and text.strip() == row.label for (text, ends, _), row in zip(results, rows, strict=True)]
    tokens = sum(count for _, _, count in results)
    speed = _speed(alone, seconds, len(rows), tokens)
    return Answers([text for text, _, _ in results], np.array(right), None, 0, speed)


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def _speed(alone: Sequence[float], seconds: float, rows: int, tokens: int) -> Speed:
    median, high = np.quantile(alone, [0.5, 0.95])
    return Speed(
        median_ms=float(median), p95_ms=float(high), rows_per_second=rows / seconds, tokens_per_second=tokens / seconds
    )
