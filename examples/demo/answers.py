"""What the deployment answers: the demo's rows with what is expected, and accuracy over test rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from adalink.runtime.errors import DataError
from adalink.runtime.sampling.sampler import PLAIN_GREEDY
from adalink.tools.parity.checks.accuracy import deployed_accuracy
from adalink.tools.terminal.console import print_table
from examples.demo import Progress
from examples.demo.rows import DemoRow, draw_test_rows
from examples.make_data import SEED, text_of

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment
    from adalink.runtime.generation.sequence import Generation

_NEW_TOKENS = 8
# The table is 100 columns wide at most.
_TEXT_WIDTH, _ANSWER_WIDTH, _BASE_WIDTH = 22, 14, 17


def show_answers(deployment: Deployment, rows: Sequence[DemoRow], backend: str, progress: Progress) -> None:
    """Print what each row is answered under its task and under the base model, beside the expected answer.

    The rows then run once more in one batch of mixed tasks; an answer that differs from the row's own is printed.
    """
    prompts = [row.prompt for row in rows]
    progress("generating with the base model")
    base = _generate(deployment, prompts, None)
    answers: dict[int, Generation] = {}
    for task in dict.fromkeys(row.task for row in rows):
        progress(f"generating with task {task}")
        numbers = [number for number, row in enumerate(rows) if row.task == task]
        answers.update(zip(numbers, _generate(deployment, [prompts[number] for number in numbers], task), strict=True))
    progress("generating in one batch of mixed tasks")
    mixed = _generate(deployment, prompts, [row.task for row in rows])
    verdicts = ["right" if is_right(answers[number], row.expected) else "WRONG" for number, row in enumerate(rows)]
    print_table(
        f"Answers of one engine ({backend}) to test rows",
        ("task", "text", "expected", "answer", "", "base model"),
        [
            (
                row.task,
                shorten(text_of(row.prompt) or row.prompt, _TEXT_WIDTH),
                row.expected,
                shorten(answers[number].text, _ANSWER_WIDTH),
                verdicts[number],
                shorten(base[number].text, _BASE_WIDTH),
            )
            for number, row in enumerate(rows)
        ],
    )
    click.echo(f"{verdicts.count('right')} of {len(rows)} answers are right. No row was chosen by its answer.")
    _compare_mixed(rows, answers, mixed)


def is_right(reply: Generation, expected: str) -> bool:
    """Whether a reply is the expected answer, spaces at its ends aside, and then ends."""
    return reply.finish_reason == "stop" and reply.text.strip() == expected.strip()


def show_accuracy(deployment: Deployment, progress: Progress) -> None:
    """Print the accuracy of every task over test rows that were drawn by seed; of a task without data, why not."""
    click.echo(f"Accuracy over test rows, drawn with seed {SEED} (± two standard errors):")
    for task in deployment.tasks:
        try:
            rows = draw_test_rows(task)
        except DataError as error:
            click.echo(f"  {task}: not measured: {error}")
            continue
        progress(f"accuracy: {len(rows)} test rows of {task}, in batches")
        share = deployed_accuracy(deployment, task, rows)
        label, count = Counter(row.completion.strip() for row in rows).most_common(1)[0]
        always = f"always {label!r} would be {100 * count / len(rows):.1f} %"
        click.echo(f"  {task}: {accuracy_line(share, len(rows))}; {always}")


def accuracy_line(share: float, count: int) -> str:
    """Rows that are right, and their share with two standard errors."""
    error = 2 * math.sqrt(share * (1 - share) / count)
    return f"{round(share * count)} of {count} right, {100 * share:.1f} % (± {100 * error:.1f})"


def shorten(text: str, width: int) -> str:
    """A text as one line of at most ``width`` characters."""
    line = " ".join(text.split()) or "(nothing)"
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _generate(deployment: Deployment, prompts: list[str], tasks: str | list[str] | None) -> list[Generation]:
    # As accuracy is measured in training, whatever the generation config of the base says.
    return deployment.generate(prompts, tasks=tasks, max_new_tokens=_NEW_TOKENS, sampling=PLAIN_GREEDY)


def _compare_mixed(rows: Sequence[DemoRow], answers: dict[int, Generation], mixed: Sequence[Generation]) -> None:
    """Print how many rows of a mixed batch are answered as they are in a batch of one task, and those that are not."""
    different = [number for number in range(len(rows)) if mixed[number].text != answers[number].text]
    click.echo(
        f"In one batch of mixed tasks {len(rows) - len(different)} of {len(rows)} answers are the same as in a batch "
        "of one task."
    )
    for number in different:
        alone, together = shorten(answers[number].text, 40), shorten(mixed[number].text, 40)
        click.echo(f"  row {number + 1} ({rows[number].task}): {together}, alone: {alone}")
