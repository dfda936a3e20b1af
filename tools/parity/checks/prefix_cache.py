"""Level 3, the prefix cache: one prompt under every task in turn, twice, so that each finds what the others left.

A row that goes on from the keys and values of another task, its KV prefix among them, deviates.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from adalink.runtime.deployment import Deployment
from adalink.runtime.engine import Backend
from adalink.runtime.errors import BackendError
from adalink.runtime.generation.request import Request
from adalink.runtime.options import OpenOptions
from adalink.tools.parity.checks.generation import GeneratedRow, Generator, Verdict, check_generation, judge
from adalink.tools.parity.checks.scheduler import Recorder
from adalink.tools.parity.checks.step_logits import LogitsFile, StepLogits
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.report import Check, at_most

_TOKENS, _ROUNDS = 8, 2
_BYTES = 1 << 30


class CachedRows:
    """Rows with the prefix cache on; none where the engine has none."""

    def __init__(
        self,
        deployment: Deployment,
        engine: tuple[Backend, str],
        prompts: Sequence[str | list[int]],
        tasks: Sequence[str | None],
    ) -> None:
        """Generate the rows.

        Args:
            deployment: the deployment.
            engine: the backend, and the name of the variant.
            prompts: texts or token ids, of which the longest is taken.
            tasks: every task.
        """
        self._rows: list[tuple[str | None, GeneratedRow]] = []
        self._verdicts: list[Verdict] = []
        self._failed: list[str] = []
        if not deployment.takes_prefix_cache:
            return
        backend, variant = engine
        # As in ``Generator``: without end tokens and the base's defaults.
        base = msgspec.structs.replace(deployment.manifest.base, eos_token_ids=(), generation=None)
        manifest = msgspec.structs.replace(deployment.manifest, base=base)
        options = OpenOptions(variant, prefix_cache_bytes=_BYTES)
        with Deployment(deployment.path, manifest, backend, options) as opened:
            encoded = [opened.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
            prompt = max(encoded, key=len)
            file = LogitsFile(opened.manifest.base.embedding_dtype)
            for task in [*tasks] * _ROUNDS:
                recorder = Recorder(file)
                request = Request(prompt, task=task, max_new_tokens=_TOKENS, processors=[recorder], draft_tokens=0)
                try:
                    result = opened.submit(request).result()
                except BackendError as error:
                    self._failed.append(str(error))
                    continue
                logits = StepLogits(file, recorder.places[: len(result.token_ids)])
                self._rows.append((task, GeneratedRow(prompt, list(result.token_ids), logits, result.text)))

    def judge(self, task: str | None, reference: Reference, generator: Generator, typical: float) -> None:
        """Judge the rows of a task, while its adapter is attached to PyTorch."""
        self._verdicts += [judge(reference, generator, row, typical) for name, row in self._rows if name == task]

    def checks(self) -> list[Check]:
        """The checks, once every task's rows were judged."""
        if not (self._rows or self._failed):
            return []
        detail = f"rows of one prompt under every task in turn; first error: {(self._failed or ['none'])[0]}"
        checks = [at_most("prefix-cache/failed-rows", len(self._failed), 0, detail)]
        if self._verdicts:
            how = "one prompt under every task in turn, from the cache: "
            checks += check_generation("prefix-cache", self._verdicts, how)
        return checks
