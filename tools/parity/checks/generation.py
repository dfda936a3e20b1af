"""Level 3, generation: every decode step of the deployment against PyTorch after the same prefix.

PyTorch runs once over the prompt and the deployment's tokens. If each token is the likeliest after its prefix, the
sequence is the greedy one. A token is wrong if PyTorch prefers another by more than twice the logit limit. Below that
two correct engines may differ, and the comparison continues along the deployment's tokens.
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
from adalink.tools.parity.checks.outputs import worst_of
from adalink.tools.parity.checks.step_logits import LogitsFile, Place, StepLogits
from adalink.tools.parity.reference.images import Pixels
from adalink.tools.parity.reference.model import Reference
from adalink.tools.parity.reference.noise_floor import Outputs, largest_deviations
from adalink.tools.parity.report import Check, at_most

if TYPE_CHECKING:
    from adalink.tools.parity.checks.vision import ImagePrompts


@dataclass(frozen=True)
class GeneratedRow:
    """Generated tokens of one prompt.

    Attributes:
        prompt: token ids of the prompt, with one placeholder for each position of an image.
        tokens: generated tokens; behind images, up to the first placeholder, which PyTorch would take for an image.
        logits: logits of each step as floating-point numbers, of which a slice has the shape ``(steps, vocab)``.
        text: the tokens' text, up to a stop text.
        pixels: the prompt's images as inputs of the PyTorch model; ``None`` without images.
    """

    prompt: list[int]
    tokens: list[int]
    logits: StepLogits | Array
    text: str
    pixels: Pixels | None = None


class Generator:
    """The deployment with recorded decode steps, without end tokens and the base's generation defaults.

    So a task that answers in one word still gives enough steps to compare. Only stop texts end a row.

    Attributes:
        drops: number of rows that left a batch before its last step.
    """

    def __init__(self, deployment: Deployment, backend: Backend, variant: str) -> None:
        # Greedy, without penalties and bans: what is compared is the engine's logits, and they alone choose.
        base = msgspec.structs.replace(deployment.manifest.base, eos_token_ids=(), generation=None)
        self._file = LogitsFile(base.embedding_dtype)
        self._places: list[list[Place]] = []
        self._alive: list[int] = []  # the rows still in the batch, by their first numbers
        self._passes = 0
        self._is_speculative: bool | None = None  # unknown before the first attempt
        self.drops = 0
        observed = ObservedBackend(backend, self._begin, self._take, self._roll_back, self._drop)
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
            # A bidirectional prompt is one pass, whatever the engine.
            prompt_rows = [self.encode(prompt) for prompt in prompts] if image_prompts is None else image_prompts.rows
            most = max(1, min(most, profile.logits_capacity // max(map(len, prompt_rows))))
        rows: list[GeneratedRow] = []
        for start in range(0, len(prompts), most):
            end = min(start + most, len(prompts))
            batch_tasks = tasks if tasks is None or isinstance(tasks, str) else tasks[start:end]
            batch_images = None if image_prompts is None else image_prompts.pick(range(start, end))
            rows += self._generate(prompts[start:end], batch_tasks, steps, batch_images, stop)
        return rows

    def generate_speculatively(
        self, prompt: str | list[int], task: str | None, steps: int
    ) -> tuple[GeneratedRow, int] | None:
        """Continue one prompt by speculative decoding, with the default number of draft tokens.

        Returns:
            The row, with logits from passes over several tokens, and the number of passes after the prompt; ``None``
            where the engine does not decode speculatively.
        """
        if self._deployment.profile is not None or self._is_speculative is False:
            return None  # a compiled engine verifies no draft tokens, and its shapes are limited
        self._passes = 0
        (row,) = self._generate([prompt], task, steps, None, (), None)
        self._is_speculative = bool(self._is_speculative)
        return (row, self._passes - 1) if self._is_speculative else None

    def _begin(self) -> None:
        self._passes += 1

    def _take(self, logits: Array) -> None:
        if not self._alive:  # those of the prompts
            self._alive = list(range(len(logits)))
            self._places = [[] for _ in logits]
        for place, row in enumerate(self._alive):
            self._places[row].append(self._file.add(logits[place]))

    def _roll_back(self, count: int) -> None:
        self._is_speculative = True
        places = self._places[self._alive[0]]
        del places[len(places) - count :]

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
        self._alive, self._file = [], LogitsFile(self._base.embedding_dtype)
        images = None if image_prompts is None else image_prompts.images
        results = self._deployment.generate(
            prompts, images=images, tasks=tasks, max_new_tokens=steps, stop=stop, draft_tokens=draft_tokens
        )
        logits = [StepLogits(self._file, places) for places in self._places]
        texts = [row.text for row in results]
        generated = [list(row.token_ids) for row in results]
        if image_prompts is None:
            names = [tasks] * len(prompts) if tasks is None or isinstance(tasks, str) else tasks
            ids = [self.encode(prompt, task) for prompt, task in zip(prompts, names, strict=True)]
            return [GeneratedRow(*row) for row in zip(ids, generated, logits, texts, strict=True)]
        placeholder, rows = vision_base(self._base).vision.image_token_id, []
        for prompt, pixels, tokens, row_logits, text in zip(
            image_prompts.rows, image_prompts.pixels, generated, logits, texts, strict=True
        ):
            end = tokens.index(placeholder) + 1 if pixels is not None and placeholder in tokens else len(tokens)
            rows.append(GeneratedRow(prompt, tokens[:end], row_logits.first(end), text, pixels))
        return rows

    def encode(self, prompt: str | list[int], task: str | None = None) -> list[int]:
        """Token ids of a prompt, as a task reads it."""
        return self._deployment.encode_prompt(prompt, task) if isinstance(prompt, str) else prompt

    def text(self, token: int) -> str:
        """Text of one token."""
        return self._deployment.tokenizer.decode([token])

    def close(self) -> None:
        """Close the deployment."""
        self._deployment.close()


@dataclass(frozen=True)
class Verdict:
    """Comparison of one generated row with PyTorch.

    Attributes:
        deviations: largest deviation of each step's logits, shape ``(steps,)``.
        limits: the tolerance at each step, likewise.
        ties: number of steps where PyTorch prefers another token within the tolerance.
        wrong: the first step beyond that, in words; empty if there is none.
    """

    deviations: Float64
    limits: Float64
    ties: int
    wrong: str


def expected_outputs(reference: Reference, row: GeneratedRow) -> Outputs:
    """PyTorch's outputs for a generated row; the reference has the task's adapter attached."""
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
        generator: for the text of tokens.
        row: the generated row.
        typical: float32's typical noise under this task.
        outputs: the row's ``expected_outputs``, if known.
    """
    outputs = expected_outputs(reference, row) if outputs is None else outputs
    chosen = np.array(row.tokens)
    expected = outputs.values["logits"][-len(chosen) :].astype(np.float64)
    limits = reference.limit(outputs.noise["logits"][-len(chosen) :], typical)
    margins = expected.max(axis=1) - expected[np.arange(len(chosen)), chosen]
    ties = int(((margins > 0) & (margins <= 2 * limits)).sum())
    wrong = ""
    steps = np.flatnonzero(~(margins <= 2 * limits))
    if len(steps):
        step = int(steps[0])
        ours, theirs = generator.text(int(chosen[step])), generator.text(int(expected[step].argmax()))
        wrong = f"step {step}: {ours!r}, PyTorch {theirs!r} by {margins[step]:.1e} (ties end at {2 * limits[step]:.1e})"
    return Verdict(largest_deviations(row.logits[:], expected), limits, ties, wrong)


def check_generation(label: str, verdicts: list[Verdict], how: str = "") -> list[Check]:
    """Checks of generated rows: no decode step deviates, and no token is wrong.

    Args:
        label: prefix of the checks' names.
        verdicts: one for each row.
        how: how the rows were generated, for the detail.
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
