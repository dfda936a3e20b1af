"""Text classifier: texts to labels, by the heads of their tasks. Mixed tasks share the engine's batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from adalink.runtime.arguments import check_kind
from adalink.runtime.arrays import Array
from adalink.runtime.errors import RequestError
from adalink.runtime.input_processor import InputProcessor
from adalink.runtime.request import Tasks, check_length, check_text
from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TOKENS
from adalink.runtime.storage.manifest import Base
from adalink.runtime.tasks.adapter_mapping import AdapterMapping
from adalink.runtime.tasks.head import TaskHead
from adalink.runtime.text.spans import Span, read_spans
from adalink.runtime.text.truncation import CutText
from adalink.runtime.text_encoder import EncodedText, TextEncoder

# A text, or a pair of texts.
Texts = Sequence[str | tuple[str, str]]

# Probability from which a text of several labels has one.
_THRESHOLD = 0.5


@dataclass(frozen=True)
class Classification:
    """What a task says of a text.

    Attributes:
        label: the likeliest label; ``None`` for a regression, for several labels and for tokens.
        labels: labels with a probability of at least one half, of a task that gives several.
        probabilities: probability of each label; empty for a regression and for tokens.
        value: the number of a regression.
        spans: parts of the text, of a task on tokens.
        tokens: tokens of the text, special tokens included.
        truncated: whether the text was longer than those of the training may be, and its end was left out.
    """

    label: str | None = None
    labels: tuple[str, ...] = ()
    probabilities: dict[str, float] = field(default_factory=dict)
    value: float | None = None
    spans: tuple[Span, ...] = ()
    tokens: int = 0
    truncated: bool = False

    def as_record(self) -> dict[str, Any]:
        """The fields that a task of its kind fills, by name, as JSON values."""
        ends = {"tokens": self.tokens, "truncated": self.truncated}
        if self.value is not None:
            return {"value": self.value, **ends}
        if self.label is not None:
            return {"label": self.label, "probabilities": self.probabilities, **ends}
        if self.probabilities:
            return {"labels": list(self.labels), "probabilities": self.probabilities, **ends}
        return {"spans": [asdict(span) for span in self.spans], **ends}


class TextClassifier:
    """Classifies texts with one base; safe for several threads."""

    def __init__(self, base: Base, inputs: InputProcessor, encoder: TextEncoder) -> None:
        self._base, self._inputs, self._encoder = base, inputs, encoder

    def classify(self, texts: Texts, tasks: Tasks) -> list[Classification]:
        """See ``Deployment.classify``."""
        prepared = self.prepare(texts, tasks)
        return [text.read(scores) for text, scores in zip(prepared, self.scores(prepared), strict=True)]

    def prepare(self, texts: Texts, tasks: Tasks) -> list[PreparedText]:
        """Tokens of each text, cut as in the task's training; raises ``RequestError``."""
        if not self._base.has_hidden_states:
            raise RequestError(f"{self._base.name} is a decoder: classify() is for tasks with a head on an encoder")
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
            raise RequestError(f"texts is {texts!r:.80}, expected a list of texts, or of pairs of texts")
        rows = self._inputs.resolve_rows(tasks, len(texts))
        return [
            self._prepare(index, text, task, mapping)
            for index, (text, (task, mapping)) in enumerate(zip(texts, rows, strict=True))
        ]

    def _prepare(
        self, index: int, text: str | tuple[str, str], task: str | None, mapping: AdapterMapping
    ) -> PreparedText:
        head = mapping.head
        if head is None:
            what = "the base model" if task is None else f"task {task!r}"
            raise RequestError(
                f"text {index}: {what} has no labels: name a task that was trained on rows with labels, or use encode()"
            )
        first, second = (text, None) if isinstance(text, str) else _pair(text, index)
        if second is not None and head.spec.problem_type == TOKENS:
            raise RequestError(f"text {index} is a pair, and task {task!r} labels the parts of one text: pass a text")
        soft = sum(len(vectors.vectors) for vectors in mapping.soft_prompts(1) if vectors is not None)
        positions = self._base.max_positions
        limit = head.spec.max_tokens if positions is None else min(head.spec.max_tokens, positions - soft)
        tokenizer = self._inputs.tokenizer
        if second is not None:
            tokenizer.check_pair()
        cut = tokenizer.encode_cut(check_text(first, f"text {index}"), second, limit=limit)
        if not cut.ids:
            raise RequestError(f"text {index} has no tokens: give it some text")
        check_length(len(cut.ids) + soft, self._base)
        return PreparedText(first, cut, head, EncodedText(cut.ids, cut.types, task, mapping, cut.is_cut))

    def scores(self, prepared: Sequence[PreparedText]) -> list[npt.NDArray[np.float64]]:
        """Scores by each text's head, before they become probabilities: see ``TaskHead.scores``."""
        scores: list[npt.NDArray[np.float64]] = [np.empty(0)] * len(prepared)
        for index, states in self._encoder.states([text.encoded for text in prepared]):
            scores[index] = prepared[index].head.scores(states)
        return scores


@dataclass(frozen=True)
class PreparedText:
    """A text on its way to its labels.

    Attributes:
        text: the text; of a pair, the first one.
        cut: its tokens.
        head: the head of its task.
        encoded: the tokens as the encoder takes them.
    """

    text: str
    cut: CutText
    head: TaskHead
    encoded: EncodedText

    def read(self, scores: Array) -> Classification:
        """What scores of its head say."""
        spec, tokens, truncated = self.head.spec, len(self.cut.ids), self.cut.is_cut
        if spec.problem_type == REGRESSION:
            return Classification(value=float(scores[0]), tokens=tokens, truncated=truncated)
        if spec.problem_type == TOKENS:
            spans = read_spans(self.text, self.cut.offsets, self.cut.words, spec.labels, softmax(scores))
            return Classification(spans=spans, tokens=tokens, truncated=truncated)
        shares = softmax(scores) if spec.problem_type == SINGLE_LABEL else sigmoid(scores)
        probabilities = dict(zip(spec.labels, shares.tolist(), strict=True))
        if spec.problem_type == MULTI_LABEL:
            labels = tuple(label for label, share in probabilities.items() if share >= _THRESHOLD)
            return Classification(labels=labels, probabilities=probabilities, tokens=tokens, truncated=truncated)
        label = spec.labels[int(scores.argmax())]
        return Classification(label=label, probabilities=probabilities, tokens=tokens, truncated=truncated)


def softmax(scores: Array) -> Array:
    """Probabilities along the last axis."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def sigmoid(scores: Array) -> Array:
    """A probability for each score."""
    small = np.exp(-np.abs(scores))
    return np.asarray(np.where(scores >= 0, 1.0, small) / (1.0 + small))


def _pair(text: object, index: int) -> tuple[str, str]:
    """The two texts of a pair; raises ``RequestError``."""
    if isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text):
        return text[0], text[1]
    check_kind(text, f"text {index}", str, "a text, or a pair of texts")
    raise RequestError(f"text {index} is None, expected a text, or a pair of texts")
