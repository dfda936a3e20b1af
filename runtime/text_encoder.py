"""Text encoder: texts to pooled vectors, in batches of rows of about the same length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from adalink.runtime.arguments import check_flag, check_kind, check_name
from adalink.runtime.arrays import Array
from adalink.runtime.batch_inputs import BatchInputs
from adalink.runtime.errors import RequestError
from adalink.runtime.finite import check_outputs
from adalink.runtime.input_processor import InputProcessor
from adalink.runtime.logs import get_logger
from adalink.runtime.model_runner import ModelRunner
from adalink.runtime.pooling import pool
from adalink.runtime.request import Prompts, Tasks, check_length, check_prompts
from adalink.runtime.storage.manifest import Base
from adalink.runtime.storage.pooling_schema import POOLING_MODES, Pooling
from adalink.runtime.storage.safetensors import as_float32
from adalink.runtime.tasks.adapter_mapping import AdapterMapping, combine
from adalink.runtime.tasks.soft_prompt import SoftPromptLayout
from adalink.runtime.text.truncation import CutText

_LOG = get_logger(__name__)

# A batch has at most so many rows and, padding included, so many tokens: more is hardly faster and takes more memory.
_BATCH_ROWS, _BATCH_TOKENS = 32, 4096


@dataclass(frozen=True)
class EncodedText:
    """Tokens of a text on their way to a vector.

    Attributes:
        ids: token ids.
        types: token type of each.
        task: name of its task; ``None`` for the base model.
        mapping: the task as it was when the text was tokenised.
        is_cut: whether the text was longer than the model's files allow, and its end, or beginning, was left out.
        skip: tokens at the beginning that are not pooled.
    """

    ids: list[int]
    types: list[int]
    task: str | None
    mapping: AdapterMapping
    is_cut: bool = False
    skip: int = 0


class TextEncoder:
    """Encodes texts with one base; safe for several threads."""

    def __init__(self, base: Base, inputs: InputProcessor, runner: ModelRunner) -> None:
        self._base, self._inputs, self._runner = base, inputs, runner

    def encode(
        self,
        texts: Prompts,
        tasks: Tasks,
        prompt: str | None,
        pooling: str | Sequence[str] | None,
        normalize: bool | None,
    ) -> npt.NDArray[np.float32]:
        """See ``Deployment.encode``."""
        choice = self.choose(pooling, normalize)
        encoded = self.tokenize(texts, tasks, prompt)
        if cut := sum(text.is_cut for text in encoded):
            limit = self._settings.max_tokens
            _LOG.warning("%d of %d texts were longer than %s tokens, and were cut", cut, len(encoded), limit)
        return self.pool(encoded, choice)

    @property
    def _settings(self) -> Pooling:
        """The base's pooling; that of a base that says nothing cuts no text."""
        return self._base.pooling or Pooling()

    def choose(self, pooling: str | Sequence[str] | None, normalize: bool | None) -> tuple[tuple[str, ...], bool]:
        """Modes of pooling, and whether vectors are normalised; the base's own by default.

        Raises:
            RequestError: the base has no states, the base says no pooling, or there is no such mode.
        """
        base, settings = self._base, self._settings
        if base.kind == "decoder":
            raise RequestError(
                f"{base.name} is a decoder, whose graphs give logits and no hidden states: texts have vectors with an "
                "encoder, such as BERT's kin"
            )
        if normalize is not None:
            check_flag(normalize, "normalize")
        known = ", ".join(repr(mode) for mode in POOLING_MODES)
        if pooling is None:
            if not settings.modes:
                why = settings.unsupported or "its checkpoint has no modules.json of sentence-transformers"
                raise RequestError(
                    f"{base.name} does not say how its states become one vector ({why}), and nothing is guessed: pass "
                    f"pooling (--pooling), one of {known} or a list of them, and normalize"
                )
            modes = settings.modes
        else:
            modes = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        if not modes or not set(modes) <= set(POOLING_MODES):
            raise RequestError(f"pooling is {pooling!r:.80}, expected one of {known}, or a list of them")
        return modes, settings.normalize if normalize is None else normalize

    def width(self, modes: Sequence[str]) -> int:
        """Numbers of a vector."""
        return len(modes) * self._base.hidden_size

    def tokenize(self, texts: Prompts, tasks: Tasks, prompt: str | None = None) -> list[EncodedText]:
        """Tokens of each text behind the prompt, cut as the model's files say.

        Args:
            texts: texts, or token ids, to which no prompt is added.
            tasks: one task for all, or one for each.
            prompt: a text before each text; by default the base's own default prompt, if it has one.

        Raises:
            RequestError: a text has no tokens, or the files set no limit and it is longer than the model takes.
        """
        check_kind(prompt, "prompt", str, "a text, or None for the base's default prompt")
        if not isinstance(texts, (str, bytes)) and len(texts) == 0:
            return []
        checked = check_prompts(texts, self._base, "text")
        rows = self._inputs.resolve_rows(tasks, len(checked))
        settings = self._settings
        if prompt is None:
            prompt = settings.prompts[settings.default_prompt] if settings.default_prompt is not None else ""
        skip = 0 if settings.include_prompt or not prompt else self._prompt_length(prompt)
        encoded = []
        for index, (text, (task, mapping)) in enumerate(zip(checked, rows, strict=True)):
            soft = sum(len(vectors.vectors) for vectors in mapping.soft_prompts(1) if vectors is not None)
            if isinstance(text, list):
                one = EncodedText(text, [0] * len(text), task, mapping)
            else:
                cut = self._cut(prompt + text, soft)
                one = EncodedText(cut.ids, cut.types, task, mapping, cut.is_cut, skip)
            if len(one.ids) <= one.skip:
                what = "has no tokens" if not one.skip else "is cut within its prompt, which is not pooled"
                raise RequestError(f"text {index} {what}: give it some text")
            check_length(len(one.ids) + soft, self._base)
            encoded.append(one)
        return encoded

    def prompt_named(self, name: str) -> str:
        """A prompt of the base by its name; raises ``RequestError``."""
        prompts = self._settings.prompts
        if check_name(name, "prompt_name") not in prompts:
            known = ", ".join(sorted(prompts)) or "none"
            raise RequestError(f"{self._base.name} has no prompt {name!r:.80}; its prompts are: {known}")
        return prompts[name]

    def _cut(self, text: str, soft: int) -> CutText:
        """Tokens of a text, cut as the files say and to what a soft prompt of ``soft`` tokens leaves."""
        settings, base = self._settings, self._base
        limit = settings.max_tokens
        if limit is not None and base.max_positions is not None:
            limit = min(limit, base.max_positions - soft)
        return self._inputs.tokenizer.encode_cut(
            text, limit=limit, left=settings.truncate_left, lower_case=settings.lower_case
        )

    def _prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt as they begin a text, without a special token behind them."""
        ids = self._cut(prompt, 0).ids
        return len(ids) - (1 if ids and ids[-1] in self._inputs.tokenizer.special_ids.values() else 0)

    def pool(self, encoded: Sequence[EncodedText], choice: tuple[tuple[str, ...], bool]) -> npt.NDArray[np.float32]:
        """Vectors of texts; rows of about the same length share a batch, whatever their tasks.

        Args:
            encoded: what ``tokenize`` returns.
            choice: what ``choose`` returns.

        Returns:
            Shape ``(texts, width)``.
        """
        modes, normalize = choice
        vectors = np.empty((len(encoded), self.width(modes)), np.float32)
        for index, states in self.states(encoded):
            vectors[index] = pool(states, modes, encoded[index].skip, normalize=normalize)
        return vectors

    def states(self, encoded: Sequence[EncodedText]) -> Iterator[tuple[int, Array]]:
        """Index of each text and the hidden states of its tokens, float32 of shape ``(tokens, d)``; in any order."""
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index].ids))
        names = [text.task for text in encoded]
        for rows in self._batches([len(encoded[index].ids) for index in order]):
            batch = [order[row] for row in rows]
            inputs, layout = self._pad([encoded[index] for index in batch])
            outputs = self._runner.run(inputs, layout, None)
            check_outputs(outputs, layout.text_mask, names, is_decoder=False, rows=batch)
            for index, states in zip(batch, outputs["last_hidden_state"], strict=True):
                yield index, as_float32(states[: len(encoded[index].ids)])

    def _batches(self, lengths: Sequence[int]) -> Iterator[range]:
        """Rows of each batch, given the rows' lengths from the longest down."""
        profile = self._runner.engine.profile
        most = _BATCH_ROWS if profile is None else min(_BATCH_ROWS, profile.batch.max)
        starts = [0]
        for row in range(len(lengths)):
            count = row - starts[-1]
            if count and (count >= most or (count + 1) * lengths[starts[-1]] > _BATCH_TOKENS):
                starts.append(row)
        yield from (range(start, stop) for start, stop in pairwise([*starts, len(lengths)]) if stop > start)

    def _pad(self, texts: Sequence[EncodedText]) -> tuple[BatchInputs, SoftPromptLayout]:
        """A batch of texts, padded on the right, with the tasks as they were when the texts were tokenised."""
        shape = (len(texts), max(len(text.ids) for text in texts))
        ids = np.full(shape, self._base.pad_token_id, np.int64)
        types, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, text in enumerate(texts):
            length = len(text.ids)
            ids[row, :length], types[row, :length], mask[row, :length] = text.ids, text.types, 1
        mappings = [text.mapping for text in texts]
        mapping = mappings[0] if all(one is mappings[0] for one in mappings) else combine(mappings)
        inputs = BatchInputs(ids, None, None, mapping, types=types if self._base.takes_token_types else None)
        return inputs, self._inputs.lay_out(inputs, mask)
