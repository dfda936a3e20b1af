"""Level 3, generation: batches of prompts under each task, and once with another task in each row."""

from __future__ import annotations

from collections.abc import Sequence

from adalink.tools.parity.checks.generation import GeneratedRow, Generator, Verdict, check_generation, judge
from adalink.tools.parity.checks.vision import ImagePrompts
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.report import Check

STEPS = 32


class Batch:
    """Prompts generated as one batch, with images or without.

    Rows of the mixed batch are judged together with their task's rows, while its adapter is attached to PyTorch.

    Attributes:
        has_images: whether the prompts have images.
        ends_apart: whether rows of the mixed batch also left it one after another.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[str | list[int]],
        tasks: Sequence[str | None],
        image_prompts: ImagePrompts | None = None,
    ) -> None:
        """Generate the mixed batch.

        Args:
            generator: the deployment.
            prompts: texts or token ids.
            tasks: the task of each row of the mixed batch; its rows take the prompts in turn.
            image_prompts: images of the prompts, if any.
        """
        self.has_images = image_prompts is not None
        self.ends_apart = False
        self._generator, self._prompts, self._image_prompts = generator, prompts, image_prompts
        chosen = [index % len(prompts) for index in range(len(tasks))]
        image_prompts = None if image_prompts is None else image_prompts.pick(chosen)
        rows = generator.generate([prompts[index] for index in chosen], tasks, STEPS, image_prompts)
        self._mixed = {"mixed": list(zip(tasks, rows, strict=True))}
        if stops := _stops(rows):
            before = generator.drops
            rows = generator.generate([prompts[index] for index in chosen], tasks, STEPS, image_prompts, stops)
            self._mixed["mixed/ends"] = list(zip(tasks, rows, strict=True))
            self.ends_apart = generator.drops > before
        self._verdicts: dict[str, list[Verdict]] = {label: [] for label in self._mixed}

    def check(self, label: str, task: str | None, reference: Reference, typical: float) -> list[Check]:
        """Every prompt under one task.

        Args:
            label: of the checks, such as ``task/topics``.
            task: the task.
            reference: PyTorch with its adapter attached.
            typical: float32's typical noise under this task.
        """
        rows = self._generator.generate(self._prompts, task, STEPS, self._image_prompts)
        for batch, mixed in self._mixed.items():
            task_rows = [row for name, row in mixed if name == task]
            self._verdicts[batch] += [judge(reference, self._generator, row, typical) for row in task_rows]
        verdicts = [judge(reference, self._generator, row, typical) for row in rows]
        return check_generation(self._named(label), verdicts) + self._check_speculative(label, task, reference, typical)

    def _check_speculative(self, label: str, task: str | None, reference: Reference, typical: float) -> list[Check]:
        """Speculative decoding of half of the longest prompt, twice, so that prompt lookup matches from the start."""
        if self.has_images:
            return []
        tokens = max((self._generator.encode(prompt) for prompt in self._prompts), key=len)
        speculative = self._generator.generate_speculatively((tokens[: len(tokens) // 2] or tokens) * 2, task, STEPS)
        if speculative is None:
            return []
        row, passes = speculative
        verdict = judge(reference, self._generator, row, typical)
        return check_generation(f"{label}/drafts", [verdict], f"{passes} passes for ")

    def check_mixed(self) -> list[Check]:
        """The mixed batch, and the one whose rows end apart, once every task has been checked."""
        return [
            check
            for label, verdicts in self._verdicts.items()
            for check in check_generation(self._named(label), verdicts)
        ]

    def _named(self, label: str) -> str:
        return f"{label}/images" if self.has_images else label


def _stops(rows: Sequence[GeneratedRow]) -> list[str]:
    """Texts that end every second row, each a little later than the one before; the others go on."""
    return sorted({row.text[: 4 + 3 * index] for index, row in enumerate(rows[::2]) if row.text.strip()})
