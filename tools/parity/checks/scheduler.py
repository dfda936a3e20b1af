"""Level 3, the scheduler: rows of mixed tasks that join and leave a running batch at drawn steps.

Each row is judged like any generated row: its decode steps and tokens against PyTorch after the same prefix. A row that
another row's state leaks into, or that gets another task, deviates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.deployment import Deployment
from adalink.runtime.engine import Backend
from adalink.runtime.errors import BackendError
from adalink.runtime.generation.handle import Handle
from adalink.runtime.generation.request import Request
from adalink.runtime.options import OpenOptions
from adalink.tools.parity.checks.generation import GeneratedRow, Generator, Verdict, check_generation, judge
from adalink.tools.parity.checks.step_logits import LogitsFile, Place, StepLogits
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.report import Check, at_most

_SLOTS = 4
_LAST_JOIN, _MOST_TOKENS = 12, 16


@dataclass(frozen=True)
class _Drawn:
    """A row: when it joins, how many tokens it may generate, and at which of them it is cancelled, if at all."""

    joins_at: int
    tokens: int
    cancelled_at: int | None


class JoinedRows:
    """Prompts that were submitted while others ran; engines without slots answer what waits as one batch.

    Attributes:
        rows: each task with its generated row.
    """

    def __init__(
        self,
        deployment: Deployment,
        engine: tuple[Backend, str],
        prompts: Sequence[str | list[int]],
        tasks: Sequence[str | None],
        *,
        compare_alone: bool = False,
    ) -> None:
        """Generate the rows.

        Args:
            deployment: the deployment.
            engine: the backend, and the name of the variant.
            prompts: texts or token ids, taken in turn.
            tasks: the task of each row.
            compare_alone: whether each row is generated alone too, for ``agreement``.
        """
        backend, variant = engine
        # As in ``Generator``: without end tokens and the base's defaults.
        base = msgspec.structs.replace(deployment.manifest.base, eos_token_ids=(), generation=None)
        manifest = msgspec.structs.replace(deployment.manifest, base=base)
        self.rows: list[tuple[str | None, GeneratedRow]] = []
        with Deployment(deployment.path, manifest, backend, OpenOptions(variant, slots=_SLOTS)) as opened:
            encoded = [
                opened.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts
            ]
            chosen = [encoded[index % len(encoded)] for index in range(len(tasks))]
            self._drawn = _draw(len(tasks))
            self._failed: list[str] = []
            self._submit(opened, chosen, tasks)
            self._same = [_is_as_alone(opened, task, row) for task, row in self.rows] if compare_alone else []
        self._verdicts: list[Verdict] = []

    @property
    def agreement(self) -> float:
        """Share of the rows whose tokens are those of the row alone; 0 unless they were compared."""
        return sum(self._same) / len(self._drawn)

    def judge(self, task: str | None, reference: Reference, generator: Generator, typical: float) -> None:
        """Judge the rows of a task, while its adapter is attached to PyTorch."""
        self._verdicts += [judge(reference, generator, row, typical) for name, row in self.rows if name == task]

    def checks(self) -> list[Check]:
        """The checks, once every task's rows were judged."""
        joins = len({drawn.joins_at for drawn in self._drawn})
        detail = f"of {len(self._drawn)} rows that joined a running batch; first error: {(self._failed or ['none'])[0]}"
        checks = [at_most("scheduler/failed-rows", len(self._failed), 0, detail)]
        if self._verdicts:
            how = f"a running batch that they joined at {joins} steps: "
            checks += check_generation("scheduler", self._verdicts, how)
        return checks

    def _submit(self, opened: Deployment, prompts: list[list[int]], tasks: Sequence[str | None]) -> None:
        """Run all rows, submitted from a logits processor of a row that runs on."""
        file = LogitsFile(opened.manifest.base.embedding_dtype)
        recorders = [Recorder(file, drawn.cancelled_at) for drawn in self._drawn]
        step = 0

        def tick(scores: Array, sequence: Sequence[int]) -> None:
            nonlocal step
            for prompt, task, drawn, recorder in zip(prompts, tasks, self._drawn, recorders, strict=True):
                if drawn.joins_at == step:
                    request = Request(prompt, task=task, max_new_tokens=drawn.tokens, processors=[recorder])
                    recorder.handle = opened.submit(request)
            step += 1

        shortest = min(prompts, key=len)
        try:
            opened.submit(Request(shortest, max_new_tokens=_LAST_JOIN + 2, processors=[tick])).result()
        except BackendError as error:
            self._failed.append(str(error))
        for prompt, task, recorder in zip(prompts, tasks, recorders, strict=True):
            if recorder.handle is None:  # the row that they were to join failed
                continue
            try:
                result = recorder.handle.result()
            except BackendError as error:
                self._failed.append(str(error))
                continue
            tokens = list(result.token_ids)
            logits = StepLogits(file, recorder.places[: len(tokens)])
            self.rows.append((task, GeneratedRow(prompt, tokens, logits, result.text)))


def _is_as_alone(opened: Deployment, task: str | None, row: GeneratedRow) -> bool:
    """Whether a row's tokens are those of the row alone."""
    request = Request(row.prompt, task=task, max_new_tokens=len(row.tokens), draft_tokens=0)
    return list(opened.submit(request).result().token_ids) == row.tokens


class Recorder:
    """A logits processor that changes nothing: keeps each step's logits, and cancels its row at one."""

    def __init__(self, file: LogitsFile, cancelled_at: int | None = None) -> None:
        self.handle: Handle | None = None
        self.places: list[Place] = []
        self._file, self._cancelled_at = file, cancelled_at

    def __call__(self, scores: Array, sequence: Sequence[int]) -> None:
        """Keep one step's logits; see ``LogitsProcessor``."""
        self.places.append(self._file.add(scores))
        if len(self.places) == self._cancelled_at and self.handle is not None:
            self.handle.cancel()


def _draw(count: int) -> list[_Drawn]:
    """The same rows each time, in the order in which they join."""
    rng: Any = np.random.default_rng(0)
    joins = sorted(rng.integers(0, _LAST_JOIN, count, endpoint=True).tolist())
    return [
        _Drawn(at, int(rng.integers(_MOST_TOKENS // 2, _MOST_TOKENS)), 5 if index % 5 == 4 else None)
        for index, at in enumerate(joins)
    ]
