"""Label scorer: how likely each label of a task is as the completion of a prompt, on a base that generates.

A label's score is the log-likelihood of its tokens and of an end token behind them, as in training. The prompt is read
once: labels are rows of one decode state, which begin with its KV cache. Engines without a static cache read the prompt
once for each label instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adalink.runtime.arrays import Array
from adalink.runtime.errors import RequestError
from adalink.runtime.finite import check_outputs
from adalink.runtime.generation.prompt import Prompt, collate
from adalink.runtime.input_processor import InputProcessor
from adalink.runtime.model_runner import ModelRunner
from adalink.runtime.request import Tasks, check_length
from adalink.runtime.storage.label_spec import LabelSet
from adalink.runtime.storage.manifest import Base
from adalink.runtime.tasks.adapter_mapping import NO_ADAPTER, combine

if TYPE_CHECKING:
    from adalink.runtime.engine import DecodeState

# Labels that share a decode state; more are taken in turn.
_ROWS = 32

Scores = npt.NDArray[np.float64]
# For each token of a label, the ids that it may have: one, or any end token.
Targets = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class LabelledPrompt:
    """A prompt on its way to the scores of its labels.

    Attributes:
        prompt: the prompt, with its task as it was when the prompt was tokenised.
        labels: its labels.
        targets: of each label.
        neutral: a prompt without content, whose scores are subtracted; ``None`` without calibration.
    """

    prompt: Prompt
    labels: LabelSet
    targets: tuple[Targets, ...]
    neutral: Prompt | None = None


class LabelScorer:
    """Scores labels with one base; safe for several threads."""

    def __init__(self, base: Base, inputs: InputProcessor, runner: ModelRunner) -> None:
        self._base, self._inputs, self._runner = base, inputs, runner
        profile = runner.engine.profile
        self._rows = _ROWS if profile is None else min(_ROWS, profile.batch.max)

    def prepare(
        self, texts: Sequence[str], tasks: Tasks, labels: LabelSet | None, neutral: str | None
    ) -> list[LabelledPrompt]:
        """Tokens of prompts and of their labels.

        Args:
            texts: the prompts.
            tasks: one task for all, or one for each.
            labels: labels of all prompts; by default those of their tasks.
            neutral: a prompt without content, for calibration.

        Raises:
            RequestError: a task has no labels, or a prompt with its longest label is too long.
        """
        prompts = self._inputs.process_prompts(texts, None, tasks, chat=False, max_new_tokens=1)
        rows = [self._prepare(index, prompt, labels) for index, prompt in enumerate(prompts)]
        if neutral is None:
            return rows
        # One for each task, in the batch's order, and of the same version of it.
        alike: dict[int, Prompt] = {}
        for row in rows:
            if id(row.prompt.tasks) not in alike:
                task = row.prompt.task
                ids = self._inputs.process_prompts([neutral], None, task, chat=False, max_new_tokens=1)[0].token_ids
                alike[id(row.prompt.tasks)] = replace(row.prompt, token_ids=ids)
                self._check_room(alike[id(row.prompt.tasks)], row.targets)
        return [replace(row, neutral=alike[id(row.prompt.tasks)]) for row in rows]

    def _prepare(self, index: int, prompt: Prompt, labels: LabelSet | None) -> LabelledPrompt:
        labels = labels or prompt.tasks.labels
        if labels is None:
            what = "the base model" if prompt.task is None else f"task {prompt.task!r}"
            raise RequestError(
                f"text {index}: {what} has no labels: pass labels, the completions that it may have, or train the task "
                "with adalink train --labels"
            )
        targets = tuple(self._targets(text) for text in labels.completions)
        self._check_room(prompt, targets)
        return LabelledPrompt(prompt, labels, targets)

    def _targets(self, label: str) -> Targets:
        tokens = self._inputs.tokenizer.encode_plain(label)
        if not tokens:
            raise RequestError(f"label {label!r:.80} has no tokens: give it some text")
        end = (self._base.eos_token_ids,) if self._base.eos_token_ids else ()
        return (*((token,) for token in tokens), *end)

    def _check_room(self, prompt: Prompt, targets: Sequence[Targets]) -> None:
        longest = max(map(len, targets)) - 1
        check_length(longest if self._base.kind == "encoder-decoder" else prompt.length + longest, self._base)

    def scores(self, prepared: Sequence[LabelledPrompt]) -> list[Scores]:
        """Scores of each prompt's labels, float64 with shape ``(labels,)``: their softmax is their probabilities.

        Raises:
            BackendError: the engine refused, or its logits are not numbers.
        """
        neutral: dict[tuple[int, LabelSet], Scores] = {}
        results = []
        for row in prepared:
            scores = self._score(row.prompt, row.targets)
            if row.neutral is not None:
                key = (id(row.neutral), row.labels)
                if key not in neutral:
                    neutral[key] = self._score(row.neutral, row.targets)
                scores = scores - neutral[key]
            results.append(scores)
        return results

    def _score(self, prompt: Prompt, targets: Sequence[Targets]) -> Scores:
        """Log-likelihood of each label after one prompt."""
        # From the longest down, so that rows that have ended are the last ones.
        order = sorted(range(len(targets)), key=lambda index: -len(targets[index]))
        scores = np.zeros(len(targets))
        for start in range(0, len(order), self._rows):
            chosen = order[start : start + self._rows]
            longest = len(targets[chosen[0]])
            state = self._begin(prompt, len(chosen), longest)
            try:
                scores[chosen] = self._follow(state, prompt, [targets[index] for index in chosen])
            finally:
                state.close()
        return scores

    def _begin(self, prompt: Prompt, rows: int, longest: int) -> DecodeState:
        """A decode state with ``rows`` rows, each the prompt."""
        engine, pad, slots = self._runner.engine, self._base.pad_token_id, self._runner.slot_engine
        if slots is None or rows == 1:
            return self._runner.start(collate([prompt] * rows, pad, engine.padding_side), longest)
        read = self._runner.start(collate([prompt], pad, engine.padding_side), longest)
        try:
            state = slots.open_slots(rows, prompt.length + longest)
            try:
                for _ in range(rows):
                    state.adopt(read)
            except BaseException:
                state.close()
                raise
        finally:
            read.close()
        return state

    def _follow(self, state: DecodeState, prompt: Prompt, targets: Sequence[Targets]) -> Scores:
        """Log-likelihoods of labels, longest first, each along its own row of ``state``."""
        embedder = self._runner.embedder
        tasks = NO_ADAPTER if self._base.kind == "encoder-decoder" else prompt.tasks
        scores, alive = np.zeros(len(targets)), len(targets)
        for position in range(len(targets[0])):
            while len(targets[alive - 1]) <= position:
                alive -= 1
                state.drop(alive)
            if position:
                tokens = np.array([[row[position - 1][0]] for row in targets[:alive]])
                state.step(embedder.lookup(tokens, embedder.for_decoding(combine([tasks] * alive))))
            logits = state.logits[:alive]
            check_outputs({"logits": logits[:, None]}, np.ones((alive, 1)), [prompt.task] * alive, is_decoder=True)
            scores[:alive] += _log_likelihoods(logits, [row[position] for row in targets[:alive]])
        return scores


def _log_likelihoods(logits: Array, targets: Sequence[tuple[int, ...]]) -> Scores:
    """Log-likelihood, in each row, that the next token is one of its targets; logits have shape ``(rows, vocab)``."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    total = np.log(np.exp(exact).sum(axis=1))
    chosen = [np.logaddexp.reduce(row[list(ids)]) for row, ids in zip(exact, targets, strict=True)]
    return np.asarray(np.array(chosen) - total)
