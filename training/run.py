"""A training run: an adapter on rows of text, or of images and text, with the Hugging Face ``Trainer``.

The Trainer's module holds the adapters alone, so a checkpoint is adapters and optimizer state, without the base.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from transformers import set_seed

from adalink.runtime.errors import ConfigError, DataError, ModelError
from adalink.runtime.rows.source import RowSource
from adalink.training.adapter_io import digest_tokenizer
from adalink.training.data.held_out import pick
from adalink.training.data.images import TrainingImages, digest_images
from adalink.training.data.labelled_rows import has_labels
from adalink.training.data.rows import check_labels, check_positions, encode_rows, find_labels
from adalink.training.data.run_rows import check_files, read_prompts
from adalink.training.evaluation import greedy_replies, share_right
from adalink.training.heads.run import train_classifier
from adalink.training.loop.eval_curve import spread
from adalink.training.loop.loop import Lesson, TrainingRun
from adalink.training.loop.options import LoopOptions
from adalink.training.loop.trainer import TrainableAdapters, collator, mean_loss, trainer_arguments
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.method.initialization import find_directions, follow_directions
from adalink.training.models.loading import base_fingerprint, load_base, load_tokenizer
from adalink.training.models.prefix_lm import prompt_form
from adalink.training.models.source import display_name
from adalink.training.models.vision import image_side
from adalink.training.outcome import RepliedRows
from adalink.training.search.search import candidate_config, search
from adalink.training.settings import HeadSettings, TrainSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel

    from adalink.training.data.rows import Example, TrainingRow
    from adalink.training.outcome import Reply
    from adalink.training.settings import SearchSettings


def train(
    base: str | Path,
    data: str | Path | RowSource,
    eval_data: str | Path | RowSource | None,
    out: str | Path,
    config: AdaLinkConfig | None = None,
    settings: TrainSettings | None = None,
    *,
    space: SearchSettings | None = None,
    head: HeadSettings | None = None,
    loop: LoopOptions | None = None,
    assume_pretokenizer: str | None = None,
) -> dict[str, Any]:
    """Train an adapter and write its folder, with a report in ``training.json`` and a model card in ``README.md``.

    The same arguments on the same machine and versions give the same adapter, also when interrupted and resumed. With a
    search this holds once its trials are done: time decides how many there are. Checkpoints and trials are kept in
    ``OUT.checkpoints`` and removed at the end.

    Args:
        base: the base model, as for ``load_base``.
        data: rows to train on, in any form that ``adalink.runtime.rows.table`` reads; with names of columns and a
            template of prompts as a ``RowSource``.
        eval_data: rows for the exact-match accuracy of base and adapter; a path's rows have columns and template of
            ``data``. ``None`` holds a fifth of ``data`` out, seeded by ``settings.seed``.
        out: adapter folder to write or replace.
        config: settings of the method; ``AdaLinkConfig()`` by default. Its ``labels`` are those of the completions
            by default, where they are few.
        settings: settings of the training run; ``TrainSettings()`` by default.
        space: learning rates, ranks and activations to search first, on rows held out of ``data``; they replace those
            of ``config`` and ``settings``. The winner is trained on all rows.
        head: settings of a task with labels: rows have texts and labels then, and the base is an encoder
            (``adalink.training.data.labelled_rows``). By default what the rows look like decides.
        loop: options that do not change the adapter: resumption, callbacks, progress.
        assume_pretokenizer: see ``load_tokenizer``.

    Returns:
        The report, as in ``training.json``.

    Raises:
        AdaLinkError: data, base, settings or target folder cannot be used.
    """
    config, settings, loop = config or AdaLinkConfig(), settings or TrainSettings(), loop or LoopOptions()
    data = RowSource.of(data)
    eval_data = data.at(eval_data) if isinstance(eval_data, str | Path) else eval_data
    check_files(data, eval_data)
    if head is not None or (data.template is None and has_labels(data)):
        if space is not None:
            raise ConfigError(
                f"a search of {space.minutes:g} minutes was asked for, and rows have labels: a search chooses for "
                "prompts and completions alone. Leave --search out; --lr, --head-lr, --rank and --activation choose"
            )
        if assume_pretokenizer is not None:
            raise ConfigError(
                f"the pre-tokenizer is {assume_pretokenizer!r}, which is for GGUF files, and rows with labels take an "
                "encoder's folder: leave --assume-pretokenizer out"
            )
        return train_classifier(base, data, eval_data, out, config, settings, head or HeadSettings(), loop)
    return _train_on_prompts(base, data, eval_data, out, config, settings, space, loop, assume_pretokenizer)


def _train_on_prompts(
    base: str | Path,
    data: RowSource,
    eval_data: RowSource | None,
    out: str | Path,
    config: AdaLinkConfig,
    settings: TrainSettings,
    space: SearchSettings | None,
    loop: LoopOptions,
    assume_pretokenizer: str | None,
) -> dict[str, Any]:
    """See ``train``."""
    run = TrainingRun(base, out, settings, loop)
    rows = read_prompts(data, eval_data, settings, loop.progress)
    config = _with_labels(config, rows.training, data.path, loop)
    has_images = any(row.images for row in (*rows.training, *rows.measured))
    loop.progress(f"loading {run.base}")
    decoder = _Decoder(base, settings, config.prepended_positions, assume_pretokenizer, has_images=has_images)
    model = decoder.model
    examples, validation = decoder.encode(rows.learned, data.path), decoder.encode(rows.validation, data.path)
    eval_examples = decoder.encode(rows.measured, (eval_data or data).path)
    record = {"base": run.base, "method": config.as_record(), "settings": settings.as_record(), "data": rows.record}
    record |= {} if space is None else {"search": asdict(space)}
    run.find_checkpoint(record | decoder.record([*examples, *validation], eval_examples))
    collate = collator(model, decoder.tokenizer, decoder.images)
    model.to(trainer_arguments(run.checkpoints, settings).device)
    first = config if space is None else candidate_config(config, space, model)
    _check_first_batch(model, first, collate(examples[: settings.batch_size]), run.base)
    parts: dict[str, Any] = {}
    with run.begin():
        if space is not None:
            try:
                config, settings, parts["search"] = search(
                    model, rows.learned, examples, collate, config, settings, space, run.checkpoints,
                    progress=loop.progress,
                )  # fmt: skip
            except (ConfigError, DataError):
                shutil.rmtree(run.checkpoints)  # it cannot be resumed
                raise
        loop.progress(f"exact match of the base on {len(eval_examples)} eval rows")
        base_replies = decoder.reply(eval_examples, prepended=0)
        set_seed(settings.seed)
        with attach(model, config) as attached:
            module = TrainableAdapters(attached)
            if config.init == "gradient" and run.last is None:
                size, seed = settings.batch_size, settings.seed
                directions = find_directions(module, attached, examples, collate, batch_size=size, seed=seed)
                follow_directions(attached, directions)
            loop.progress(f"training on {len(examples)} rows, {settings.max_steps} steps")
            watched, size = validation or pick(eval_examples, spread(len(eval_examples))), settings.batch_size
            lesson = Lesson(module, examples, collate, lambda: {"loss": mean_loss(module, watched, collate, size)})
            history = run.train(lesson, settings)
            adapter = run.make_adapter(attached, decoder.tokenizer)
            loop.progress(f"exact match of the adapter on {len(eval_examples)} eval rows")
            replies = decoder.reply(eval_examples, prepended=config.prepended_positions)
    parts |= {"method": config.as_record(), "settings": settings.as_record()}
    parts["exact_match"] = {"base": share_right(base_replies), "adapter": share_right(replies)}
    labels = None if config.labels is None else config.labels.names
    return run.finish(adapter, history, parts, RepliedRows(rows.measured, replies, base_replies, labels))


class _Decoder:
    """A base that generates text, and its rows' tokens."""

    def __init__(
        self,
        base: str | Path,
        settings: TrainSettings,
        prepended: int,
        assume_pretokenizer: str | None,
        *,
        has_images: bool,
    ) -> None:
        """Load it; raises ``ModelError``, also for a base that cannot generate."""
        self.tokenizer = load_tokenizer(base, assume_pretokenizer=assume_pretokenizer)
        self.model = load_base(base)
        if not self.model.can_generate():
            raise ModelError(
                f"base model {display_name(base)} is a {type(self.model).__name__}, which cannot generate text: an "
                'encoder takes rows with labels, {"text": "...", "label": "..."}; or use '
                "adalink.training.method.attach in a loop of your own"
            )
        self._settings, self._prepended = settings, prepended
        # The model determines the prompt form and how many positions an image takes up.
        self.images = TrainingImages(base, self.model, self.tokenizer) if has_images else None
        self._form = prompt_form(self.model, self.tokenizer)

    def encode(self, rows: Sequence[TrainingRow], origin: Path) -> list[Example]:
        """Tokens of rows; raises ``DataError``."""
        tokens = None if self.images is None else self.images.tokens
        examples = encode_rows(rows, self.tokenizer, self._settings.max_length, origin, tokens, self._form)
        check_positions(examples, self.model, self._prepended, origin)
        return examples

    def record(self, examples: Sequence[Example], eval_examples: Sequence[Example]) -> dict[str, Any]:
        """Digests of the base and of the rows' images, for the report."""
        digests: dict[str, Any] = {"base_fingerprint": base_fingerprint(self.model)}
        digests["tokenizer_digest"] = digest_tokenizer(self.tokenizer)
        if self.images is not None:
            digests["images"] = {"train": digest_images(examples), "eval": digest_images(eval_examples)}
        return digests

    def reply(self, examples: Sequence[Example], *, prepended: int) -> list[Reply]:
        """Greedy replies, behind so many positions of an adapter."""
        size = self._settings.batch_size
        return greedy_replies(self.model, self.tokenizer, examples, size, self.images, prepended=prepended)


def _with_labels(config: AdaLinkConfig, rows: Sequence[TrainingRow], origin: Path, loop: LoopOptions) -> AdaLinkConfig:
    """The settings with the labels of the rows, where they are few; raises ``DataError`` if they have others."""
    if config.labels is not None:
        check_labels(rows, config.labels, origin)
    elif labels := find_labels(rows):
        config = msgspec.structs.replace(config, labels=labels)
        loop.progress(f"completions are {len(labels.names)} labels: {', '.join(labels.names):.200}")
    return config


def _check_first_batch(
    model: PreTrainedModel, config: AdaLinkConfig, batch: dict[str, torch.Tensor], name: str
) -> None:
    """Check, before anything slow, that the method fits the base and that a batch of rows has a finite loss.

    Raises:
        AdaLinkError: as ``attach``; several modalities need a base that takes images; or the loss is not finite.
    """
    if len(config.modalities) > 1 and image_side(model) is None:
        raise ConfigError(
            f"the modalities are {', '.join(config.modalities)}, and the rows of {name}, a {type(model).__name__}, are "
            "text alone: leave --modality out"
        )
    with attach(model, config) as attached:
        module = TrainableAdapters(attached).eval()
        losses = module.row_losses(**{key: value.to(model.device) for key, value in batch.items()})
    if not losses.isfinite().all():
        raise ModelError(
            f"base model {name} has a loss of {float(losses.mean())} on the first rows, before any training; expected "
            "a finite one: its weights hold NaN or overflow"
        )
