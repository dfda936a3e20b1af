"""Text classifier: texts to labels, by the heads of their tasks, or by how likely their labels are as text.

Tasks with heads share the engine's batches. On a base that generates, each prompt is read once for all its labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from adalink.runtime.arguments import check_kind
from adalink.runtime.arrays import Array
from adalink.runtime.errors import RequestError
from adalink.runtime.input_processor import InputProcessor
from adalink.runtime.label_scorer import LabelledPrompt, LabelScorer
from adalink.runtime.request import Tasks, check_length, check_text
from adalink.runtime.storage.head_spec import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TOKENS, Head
from adalink.runtime.storage.label_spec import LabelSet, fault_in_labels
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

    def __init__(self, base: Base, inputs: InputProcessor, encoder: TextEncoder, scorer: LabelScorer) -> None:
        self._base, self._inputs, self._encoder, self._scorer = base, inputs, encoder, scorer

    def classify(
        self, texts: Texts, tasks: Tasks, labels: Sequence[str] | None = None, calibration: str | None = None
    ) -> list[Classification]:
        """See ``Deployment.classify``."""
        prepared = self.prepare(texts, tasks, labels, calibration)
        return [text.read(scores) for text, scores in zip(prepared, self.scores(prepared), strict=True)]

    def prepare(
        self, texts: Texts, tasks: Tasks, labels: Sequence[str] | None = None, calibration: str | None = None
    ) -> list[PreparedText | PreparedPrompt]:
        """Tokens of each text, with a head cut as in the task's training; raises ``RequestError``."""
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
            raise RequestError(f"texts is {texts!r:.80}, expected a list of texts, or of pairs of texts")
        if not len(texts):
            return []
        rows = self._inputs.resolve_rows(tasks, len(texts))
        if self._base.kind != "encoder" and not any(mapping.head for _, mapping in rows):
            return self._prepare_prompts(texts, tasks, labels, calibration)
        if labels is not None or calibration is not None:
            raise RequestError("labels and calibration are for tasks that say labels as text: this one has a head")
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

    def _prepare_prompts(
        self, texts: Texts, tasks: Tasks, labels: Sequence[str] | None, calibration: str | None
    ) -> list[PreparedText | PreparedPrompt]:
        prompts: list[str] = []
        for index, text in enumerate(texts):
            if isinstance(text, (tuple, list)):
                raise RequestError(
                    f"text {index} is a pair, and {self._base.name} takes prompts: write both texts into one"
                )
            check_kind(text, f"text {index}", str, "a text")
            prompts.append(check_text(text, f"text {index}"))
        rows = self._scorer.prepare(prompts, tasks, _label_set(labels), calibration)
        return [PreparedPrompt(row) for row in rows]

    def scores(self, prepared: Sequence[PreparedText | PreparedPrompt]) -> list[npt.NDArray[np.float64]]:
        """Scores of each text's labels, before they become probabilities: see ``TaskHead`` and ``LabelScorer``."""
        texts = [text for text in prepared if isinstance(text, PreparedText)]
        if len(texts) != len(prepared):
            return self._scorer.scores([text.labelled for text in prepared if isinstance(text, PreparedPrompt)])
        return self._head_scores(texts)

    def _head_scores(self, prepared: Sequence[PreparedText]) -> list[npt.NDArray[np.float64]]:
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
        said = read_scores(self.head.spec, scores, self.text, self.cut.offsets, self.cut.words)
        return replace(said, tokens=len(self.cut.ids), truncated=self.cut.is_cut)


def read_scores(
    spec: Head, scores: Array, text: str, offsets: Sequence[tuple[int, int]], words: Sequence[int | None]
) -> Classification:
    """What scores of a head say of a text.

    Args:
        spec: the head.
        scores: one for each label, or ``(tokens, labels)``.
        text: the text; of a pair, the first one.
        offsets: of each token the first character and the one behind the last.
        words: number of each token's word; ``None`` for special tokens.
    """
    if spec.problem_type == REGRESSION:
        return Classification(value=float(scores[0]))
    if spec.problem_type == TOKENS:
        return Classification(spans=read_spans(text, offsets, words, spec.labels, softmax(scores)))
    shares = softmax(scores) if spec.problem_type == SINGLE_LABEL else sigmoid(scores)
    probabilities = dict(zip(spec.labels, shares.tolist(), strict=True))
    if spec.problem_type == MULTI_LABEL:
        labels = tuple(label for label, share in probabilities.items() if share >= _THRESHOLD)
        return Classification(labels=labels, probabilities=probabilities)
    return Classification(label=spec.labels[int(scores.argmax())], probabilities=probabilities)


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt on its way to its labels, on a base that generates."""

    labelled: LabelledPrompt

    def read(self, scores: Array) -> Classification:
        """What the scores of its labels say."""
        names = self.labelled.labels.names
        probabilities = dict(zip(names, softmax(scores).tolist(), strict=True))
        tokens = len(self.labelled.prompt.token_ids)
        return Classification(label=names[int(scores.argmax())], probabilities=probabilities, tokens=tokens)


def _label_set(labels: Sequence[str] | None) -> LabelSet | None:
    """Labels of a request; raises ``RequestError``."""
    if labels is None:
        return None
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise RequestError(f"labels are {labels!r:.80}, expected a list of texts")
    made = LabelSet(completions=tuple(labels))
    if fault := fault_in_labels(made):
        raise RequestError(fault)
    return made


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
