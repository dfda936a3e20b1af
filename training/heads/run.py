"""A training run of a task with labels: an adapter and a head on an encoder, with the Hugging Face ``Trainer``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from transformers import set_seed

from adalink.runtime.arrays import Array
from adalink.runtime.errors import ConfigError, DataError, ModelError
from adalink.runtime.storage.head_spec import REGRESSION, TOKENS, Head
from adalink.runtime.text_classifier import Classification, read_scores
from adalink.training.adapter_io import digest_tokenizer
from adalink.training.data.held_out import pick
from adalink.training.data.labelled_rows import LabelledRow, check_labels, find_labels
from adalink.training.data.run_rows import RunRows, read_labelled
from adalink.training.heads.classifier import LabelCollator, LabelledExample, TrainableClassifier, encode_labelled
from adalink.training.heads.label_texts import check_label_texts, label_vectors, place
from adalink.training.heads.linear_probe import fit_head
from adalink.training.heads.metrics import measure
from adalink.training.loop.eval_curve import spread
from adalink.training.loop.loop import Lesson, TrainingRun
from adalink.training.loop.options import LoopOptions
from adalink.training.loop.trainer import batches, mean_loss, trainer_arguments
from adalink.training.method.attach import attach
from adalink.training.models.loading import base_fingerprint, load_base, load_tokenizer, max_positions
from adalink.training.models.sentence_files import read_pooling
from adalink.training.models.source import display_name
from adalink.training.outcome import ClassifiedRows
from adalink.training.settings import HeadSettings, TrainSettings

if TYPE_CHECKING:
    from adalink.runtime.rows.source import RowSource
    from adalink.training.method.config import AdaLinkConfig

# Settings of the method where the head is trained alone.
_ALONE = {"rank": 0, "activation": "identity", "bias": False, "dropout": 0.0, "init": "kaiming", "soft_tokens": 0}


def train_classifier(
    base: str | Path,
    data: RowSource,
    eval_data: RowSource | None,
    out: str | Path,
    config: AdaLinkConfig,
    settings: TrainSettings,
    options: HeadSettings,
    loop: LoopOptions,
) -> dict[str, Any]:
    """Train an adapter with a head on rows with labels, and write its folder; see ``adalink.training.run.train``.

    Raises:
        AdaLinkError: data, base, settings or target folder cannot be used.
    """
    run = TrainingRun(base, out, settings, loop)
    if config.init == "gradient" and not options.alone:
        raise ConfigError(
            "init is 'gradient', which needs completions: choose kaiming or centered for rows with labels"
        )
    kind, rows = read_labelled(data, eval_data, options.problem_type, settings, loop.progress)
    labels = find_labels(kind, rows.training, data.path)
    if options.kind == "none":
        has_bottleneck = isinstance(config.rank, dict) or config.rank > 0
        check_label_texts(kind, has_adapter=not options.alone and (has_bottleneck or config.soft_tokens > 0))
    loop.progress(f"loading {run.base}")
    encoder = _Encoder(base, (kind, labels), settings, options, 0 if options.alone else config.prepended_positions)
    check_labels(encoder.head, rows.measured, (eval_data or data).path)
    config = msgspec.structs.replace(config, head=encoder.head, **(_ALONE if options.alone else {}))
    examples, validation = (encoder.encode(some, data.path, loop) for some in (rows.learned, rows.validation))
    eval_examples = encoder.encode(rows.measured, (eval_data or data).path, loop)
    run.find_checkpoint(
        {
            "base": run.base,
            "method": config.as_record(),
            "settings": {**settings.as_record(), **options.as_record()},
            "data": rows.record,
            "base_fingerprint": base_fingerprint(encoder.model),
            "tokenizer_digest": digest_tokenizer(encoder.tokenizer),
        }
    )
    encoder.model.to(trainer_arguments(run.checkpoints, settings).device)
    with run.begin():
        vectors = None if options.kind == "linear" else encoder.label_vectors(examples)
        set_seed(settings.seed)
        with attach(encoder.model, config) as attached:
            if vectors is not None:
                place(attached, vectors)
            module, collate = TrainableClassifier(attached), encoder.collate
            scale = Scale.of(examples) if kind == REGRESSION else Scale()
            if vectors is None and options.init == "probe" and run.last is None:
                loop.progress("fitting the head to the base's states, to start from there")
                fit_head(module, scale.apply(examples), collate, settings)
            answers = _Answers(module, collate, settings.batch_size)
            loop.progress(f"training on {len(examples)} rows with {len(labels)} labels, {settings.max_steps} steps")
            measure_beside = partial(answers.curve_point, *_watch(rows, validation, eval_examples), scale)
            optimizer = _optimizer(module, settings, options)
            history = run.train(Lesson(module, scale.apply(examples), collate, measure_beside, optimizer), settings)
            scale.unscale(module)
            adapter = run.make_adapter(attached, encoder.tokenizer)
            loop.progress(f"measuring on {len(rows.measured)} eval rows")
            said = answers.give(rows.measured, eval_examples)
    evaluation = measure(encoder.head, rows.measured, said)
    return run.finish(adapter, history, {"evaluation": evaluation}, ClassifiedRows(rows.measured, said, encoder.head))


class _Encoder:
    """A base that reads text, the head that it gets, and its rows' tokens."""

    def __init__(
        self,
        base: str | Path,
        task: tuple[str, tuple[str, ...]],
        settings: TrainSettings,
        options: HeadSettings,
        prepended: int,
    ) -> None:
        """Load it.

        Args:
            base: the base model.
            task: problem type and labels.
            settings: settings of the run.
            options: settings of the head.
            prepended: positions that the adapter puts before each row.

        Raises:
            ModelError: it cannot be loaded, or is a decoder.
            ConfigError: a setting does not suit it.
        """
        self.tokenizer, self.model = load_tokenizer(base), load_base(base)
        if self.model.can_generate() and not self.model.config.is_encoder_decoder:
            raise ModelError(
                f"base model {display_name(base)} is a {type(self.model).__name__}, a decoder: rows with labels are "
                'for encoders; give it rows {"prompt": "...", "completion": "..."}, or make them with --template'
            )
        self.head = _make_head(base, self.tokenizer, self.model, task, settings, options, prepended)
        pad = self.tokenizer.pad_token_id
        self.collate = LabelCollator(self.head, pad if isinstance(pad, int) else 0)

    def encode(self, rows: Sequence[LabelledRow], origin: Path, loop: LoopOptions) -> list[LabelledExample]:
        """Tokens of rows; says how many are cut."""
        encoded = encode_labelled(rows, self.tokenizer, self.head)
        if cut := sum(example.is_cut for example in encoded):
            most = self.head.max_tokens
            loop.progress(f"{origin}: {cut} of {len(rows)} texts are longer than {most} tokens, and are cut")
        return encoded

    def label_vectors(self, examples: Sequence[LabelledExample]) -> torch.Tensor:
        """See ``adalink.training.heads.label_texts``."""
        return label_vectors(self.model, self.tokenizer, self.head, examples, self.collate)


@dataclass(frozen=True)
class _Answers:
    """What an adapter with its head says of rows, as it is now."""

    module: TrainableClassifier
    collate: LabelCollator
    batch_size: int

    def give(self, rows: Sequence[LabelledRow], examples: Sequence[LabelledExample]) -> list[Classification]:
        """The answer to each row, whose tokens are ``examples``."""
        scores = predict(self.module, examples, self.collate, self.batch_size)
        return classify_examples(self.module.spec, rows, examples, scores)

    def curve_point(
        self, rows: Sequence[LabelledRow], examples: Sequence[LabelledExample], scale: Scale
    ) -> dict[str, float]:
        """The loss, as in training, and the measure to look at first; of scaled numbers the loss alone."""
        loss = mean_loss(self.module, scale.apply(examples), self.collate, self.batch_size)
        if self.module.spec.problem_type == REGRESSION:
            return {"loss": loss}
        measures = measure(self.module.spec, rows, self.give(rows, examples))
        name, value = next(iter(measures.items()))
        return {"loss": loss, name: value}


def _watch(
    rows: RunRows[LabelledRow], validation: list[LabelledExample], eval_examples: list[LabelledExample]
) -> tuple[list[LabelledRow], list[LabelledExample]]:
    """Rows of the evaluation curve and their tokens: those held out to decide by, else some of the eval rows."""
    if validation:
        return rows.validation, validation
    numbers = spread(len(eval_examples))
    return pick(rows.measured, numbers), pick(eval_examples, numbers)


def _make_head(
    base: str | Path,
    tokenizer: Any,
    model: Any,
    task: tuple[str, tuple[str, ...]],
    settings: TrainSettings,
    options: HeadSettings,
    prepended: int,
) -> Head:
    """The head of a task: by default pooled as the base's own sentence-transformers files say, else by the mean."""
    kind, labels = task
    limit = max_positions(model)
    longest = settings.max_length if limit is None else min(settings.max_length, limit - prepended)
    if longest < 1:
        raise ConfigError(f"the soft prompt has {prepended} positions of the {limit} that the base takes: shorten it")
    if kind == TOKENS:
        if options.pooling is not None:
            raise ConfigError(f"pooling is {options.pooling!r}, and tags are for single tokens: leave it out")
        return Head(problem_type=kind, labels=labels, max_tokens=longest)
    pooling = options.pooling
    if pooling is None:
        own = read_pooling(base, tokenizer, model.config)
        pooling = own.modes[0] if own is not None and len(own.modes) == 1 else "mean"
    return Head(problem_type=kind, labels=labels, pooling=pooling, max_tokens=longest)


@dataclass(frozen=True)
class Scale:
    """How a regression's numbers are scaled in training: to mean 0 and spread 1."""

    mean: float = 0.0
    spread: float = 1.0

    @classmethod
    def of(cls, examples: Sequence[LabelledExample]) -> Scale:
        """The scale of these numbers; raises ``DataError`` where all are one."""
        values = np.array([example.target for example in examples], np.float64)
        mean, spread = float(values.mean()), float(values.std())
        if spread == 0.0:
            raise DataError(f"all rows have the number {mean}: there is nothing to learn")
        return cls(mean, spread)

    def apply(self, examples: Sequence[LabelledExample]) -> Sequence[LabelledExample]:
        """Examples with scaled numbers."""
        if self == Scale():
            return examples
        return [replace(one, target=(float(one.target) - self.mean) / self.spread) for one in examples]  # type: ignore[arg-type]

    @torch.no_grad()
    def unscale(self, module: TrainableClassifier) -> None:
        """Let the head give the rows' own numbers."""
        module.head.weight.mul_(self.spread)
        module.head.bias.mul_(self.spread).add_(self.mean)


@torch.no_grad()
def predict(
    module: TrainableClassifier, examples: Sequence[LabelledExample], collate: LabelCollator, batch_size: int
) -> list[Array]:
    """Scores of each example, float32 with shape ``(labels,)``, or ``(tokens, labels)``."""
    module.eval()
    scores: list[Array] = []
    for batch in batches(examples, collate, batch_size, module.head.weight.device):
        del batch["labels"]
        scores.extend(module.scores(**batch).float().cpu().numpy())
    return [
        value[: len(example.ids)] if value.ndim == 2 else value for value, example in zip(scores, examples, strict=True)
    ]


def classify_examples(
    head: Head, rows: Sequence[LabelledRow], examples: Sequence[LabelledExample], scores: Sequence[Array]
) -> list[Classification]:
    """What scores of a head say of each row."""
    return [
        replace(
            read_scores(head, values, row.text, example.offsets, example.words),
            tokens=len(example.ids),
            truncated=example.is_cut,
        )
        for row, example, values in zip(rows, examples, scores, strict=True)
    ]


def _optimizer(module: TrainableClassifier, settings: TrainSettings, options: HeadSettings) -> torch.optim.Optimizer:
    """AdamW with a rate of its own for the head."""
    rates = ((module.adapters, settings.lr), (module.head, options.lr))
    learned = [([one for one in part.parameters() if one.requires_grad], lr) for part, lr in rates]
    return torch.optim.AdamW([{"params": some, "lr": lr} for some, lr in learned if some], weight_decay=0.0)
