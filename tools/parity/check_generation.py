"""Level 3, generation: every decode step of the deployment against PyTorch after the same prefix.

PyTorch runs once over the prompt and the tokens that the deployment chose. If each token is the likeliest after its
prefix, the sequence is the greedy one. A token counts as wrong only where PyTorch prefers another by more than twice
the logit limit: below that, two correct engines may differ, and the comparison goes on along the deployment's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from adalink.export.adapter.error_bound import Float64
from adalink.runtime.arrays import Array
from adalink.runtime.deployment import Deployment
from adalink.runtime.engine import Backend
from adalink.runtime.options import OpenOptions
from adalink.runtime.storage.vision_base import vision_base
from adalink.tools.common.observed_backend import ObservedBackend
from adalink.tools.parity.check_adapter import to_float64
from adalink.tools.parity.check_outputs import worst_of
from adalink.tools.parity.reference import Outputs, Pixels, Reference
from adalink.tools.parity.report import Check, at_most

if TYPE_CHECKING:
    from adalink.tools.parity.check_vision import ImagePrompts


@dataclass(frozen=True)
class GeneratedRow:
    """What the deployment generated after one prompt.

    Attributes:
        prompt: token ids of the prompt, with placeholders for all that its images take up.
        tokens: the tokens chosen; behind images, up to the first placeholder, which PyTorch would take for an image.
        logits: what each was chosen from, shape ``(steps, vocab)``.
        text: the tokens' text, up to a stop text.
        pixels: the prompt's images as PyTorch takes them; ``None`` without images.
    """

    prompt: list[int]
    tokens: list[int]
    logits: Float64
    text: str
    pixels: Pixels | None = None


class Generator:
    """The deployment again, with its decode steps recorded and no token that ends a generation.

    A task whose answer is one word still gives as many steps to compare as are asked for. Rows end before that only
    where stop texts are given.

    Attributes:
        drops: rows that have left a batch before its last step.
    """

    def __init__(self, deployment: Deployment, backend: Backend, variant: str) -> None:
        base = msgspec.structs.replace(deployment.manifest.base, eos_token_ids=())
        self._logits: list[list[Array]] = []
        self._alive: list[int] = []  # number of each row that is left, among those that the batch began with
        self._passes = 0
        self._makes_drafts: bool | None = None  # not known before the first attempt
        self.drops = 0
        observed = ObservedBackend(backend, self._begin, self._take, self._forget, self._drop)
        manifest = msgspec.structs.replace(deployment.manifest, base=base)
        self._deployment = Deployment(deployment.path, manifest, observed, OpenOptions(variant))
        self._base = base

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        tasks: str | Sequence[str | None] | None,
        steps: int,
        image_prompts: ImagePrompts | None = None,
        stop: Sequence[str] = (),
    ) -> list[GeneratedRow]:
        """Continue all prompts greedily, in one batch or in as many as the engine's profile asks for.

        Args:
            prompts: texts or token ids, with one placeholder for each image.
            tasks: one for all, or one for each.
            steps: tokens to generate.
            image_prompts: the images of the prompts, if they have some.
            stop: texts that end a row.
        """
        profile = self._deployment.profile
        most = len(prompts) if profile is None else profile.batch.max
        if profile is not None and self._deployment.manifest.base.bidirectional_prompt:
            # Those that go in at once, whatever the engine.
            rows_given = [self.encode(prompt) for prompt in prompts] if image_prompts is None else image_prompts.rows
            most = max(1, min(most, profile.logits_capacity // max(map(len, rows_given))))
        rows: list[GeneratedRow] = []
        for start in range(0, len(prompts), most):
            own = tasks if tasks is None or isinstance(tasks, str) else tasks[start : start + most]
            seen = None if image_prompts is None else image_prompts.pick(range(start, min(start + most, len(prompts))))
            rows += self._generate(prompts[start : start + most], own, steps, seen, stop)
        return rows

    def by_drafts(self, prompt: str | list[int], task: str | None, steps: int) -> tuple[GeneratedRow, int] | None:
        """Continue one prompt by drafts, as many as ``generate`` makes unless told otherwise.

        Returns:
            The row, with the logits of passes over several tokens, and how many passes followed the prompt; ``None``
            where the engine makes no drafts.
        """
        if self._deployment.profile is not None or self._makes_drafts is False:
            return None  # a compiled engine makes none, and its shapes are limited
        self._passes = 0
        (row,) = self._generate([prompt], task, steps, None, (), None)
        self._makes_drafts = bool(self._makes_drafts)
        return (row, self._passes - 1) if self._makes_drafts else None

    def _begin(self) -> None:
        self._passes += 1

    def _take(self, logits: Array) -> None:
        if not self._alive:  # those of the prompts
            self._alive = list(range(len(logits)))
            self._logits = [[] for _ in logits]
        for place, row in enumerate(self._alive):
            self._logits[row].append(logits[place].copy())

    def _forget(self, count: int) -> None:
        self._makes_drafts = True
        own = self._logits[self._alive[0]]
        del own[len(own) - count :]

    def _drop(self, place: int) -> None:
        self._alive[place] = self._alive[-1]
        self._alive.pop()
        self.drops += bool(self._alive)

    def _generate(
        self,
        prompts: Sequence[str | list[int]],
        tasks: str | Sequence[str | None] | None,
        steps: int,
        image_prompts: ImagePrompts | None,
        stop: Sequence[str],
        draft_tokens: int | None = 0,
    ) -> list[GeneratedRow]:
        self._alive = []
        images = None if image_prompts is None else image_prompts.pictures
        found = self._deployment.generate(
            prompts, images=images, tasks=tasks, max_new_tokens=steps, stop=stop, draft_tokens=draft_tokens
        )
        logits = [to_float64(np.stack(own), self._base.embedding_dtype) for own in self._logits]
        texts = [row.text for row in found]
        made = [list(row.token_ids) for row in found]
        if image_prompts is None:
            ids = [self.encode(prompt) for prompt in prompts]
            return [GeneratedRow(*row) for row in zip(ids, made, logits, texts, strict=True)]
        placeholder, rows = vision_base(self._base).vision.image_token_id, []
        for prompt, pixels, tokens, own, text in zip(
            image_prompts.rows, image_prompts.pixels, made, logits, texts, strict=True
        ):
            end = tokens.index(placeholder) + 1 if pixels is not None and placeholder in tokens else len(tokens)
            rows.append(GeneratedRow(prompt, tokens[:end], own[:end], text, pixels))
        return rows

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt."""
        return self._deployment.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def text(self, token: int) -> str:
        """Text of one token."""
        return self._deployment.tokenizer.decode([token])

    def close(self) -> None:
        """Close the deployment."""
        self._deployment.close()


@dataclass(frozen=True)
class Verdict:
    """What PyTorch says of one generated row.

    Attributes:
        deviations: largest deviation of each step's logits, shape ``(steps,)``.
        limits: what is allowed, likewise.
        ties: steps where PyTorch prefers another token by no more than rounding may explain.
        wrong: the first step whose token PyTorch clearly would not choose, in words; empty if there is none.
    """

    deviations: Float64
    limits: Float64
    ties: int
    wrong: str


def expected_outputs(reference: Reference, row: GeneratedRow) -> Outputs:
    """What PyTorch gives for a generated row; the reference has the adapter of its task attached."""
    base = reference.base
    if base.kind == "encoder-decoder":
        assert base.decoder_start_token_id is not None
        return reference.outputs(row.prompt, [base.decoder_start_token_id, *row.tokens[:-1]])
    tokens = [*row.prompt, *row.tokens[:-1]]
    return reference.outputs(tokens, None, prompt_length=len(row.prompt), pixels=row.pixels)


def judge(
    reference: Reference, generator: Generator, row: GeneratedRow, typical: float, outputs: Outputs | None = None
) -> Verdict:
    """Compare one row with PyTorch.

    Args:
        reference: PyTorch.
        generator: names tokens.
        row: what was generated.
        typical: float32's typical noise under this task.
        outputs: what ``expected_outputs`` gave for the row, if it was run before.
    """
    outputs = expected_outputs(reference, row) if outputs is None else outputs
    chosen = np.array(row.tokens)
    expected = outputs.values["logits"][-len(chosen) :]
    limits = reference.limit(outputs.noise["logits"][-len(chosen) :], typical)
    margins = expected.max(axis=1) - expected[np.arange(len(chosen)), chosen]
    ties = int(((margins > 0) & (margins <= 2 * limits)).sum())
    wrong = ""
    steps = np.flatnonzero(~(margins <= 2 * limits))
    if len(steps):
        step = int(steps[0])
        ours, theirs = generator.text(int(chosen[step])), generator.text(int(expected[step].argmax()))
        wrong = f"step {step}: {ours!r}, PyTorch {theirs!r} by {margins[step]:.1e} (ties end at {2 * limits[step]:.1e})"
    return Verdict(np.abs(row.logits - expected).max(axis=1), limits, ties, wrong)


def check_generation(label: str, verdicts: list[Verdict], how: str = "") -> list[Check]:
    """No decode step may deviate, and no token may be one that PyTorch would clearly not choose.

    Args:
        label: of the checks.
        verdicts: of the rows.
        how: they were made, for the detail.
    """
    wrong = [f"row {index}, {verdict.wrong}" for index, verdict in enumerate(verdicts) if verdict.wrong]
    ties = sum(verdict.ties for verdict in verdicts)
    rows = f"{how}{len(verdicts)} rows with {sum(len(verdict.limits) for verdict in verdicts)} greedy steps"
    deviation, limit, row, step = worst_of(
        [verdict.deviations for verdict in verdicts], [verdict.limits for verdict in verdicts]
    )
    return [
        at_most(
            f"{label}/decode-logits",
            deviation,
            limit,
            f"|Δ| nearest its limit, with the KV cache, of {rows}: row {row}, step {step}",
        ),
        at_most(
            f"{label}/generation",
            len(wrong),
            0,
            f"rows with a wrong token, of {rows}; {ties} ties; first differing: {wrong[0] if wrong else 'none'}",
        ),
    ]
