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
from adalink.training.classifier_run import train_classifier
from adalink.training.data.held_out import pick
from adalink.training.data.images import TrainingImages, digest_images
from adalink.training.data.labelled_rows import has_labels
from adalink.training.data.rows import check_labels, check_positions, encode_rows, find_labels
from adalink.training.data.run_rows import check_files, read_prompts
from adalink.training.eval_curve import spread
from adalink.training.evaluation import greedy_replies, share_right
from adalink.training.loop import Lesson, TrainingRun
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.method.initialization import find_directions, follow_directions
from adalink.training.models.loading import base_fingerprint, load_base, load_tokenizer
from adalink.training.models.prefix_lm import prompt_form
from adalink.training.models.vision import image_side
from adalink.training.outcome import RepliedRows
from adalink.training.search.search import candidate_config, search
from adalink.training.settings import HeadSettings, LoopOptions, TrainSettings
from adalink.training.trainer import TrainableAdapters, collator, mean_loss, trainer_arguments

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
    run = TrainingRun(base, out, settings, loop)
    rows = read_prompts(data, eval_data, settings, loop.progress)
    config = _with_labels(config, rows.training, data.path, loop)
    record: dict[str, Any] = {
        "base": run.base,
        "method": config.as_record(),
        "settings": settings.as_record(),
        "data": rows.record,
    }
    if space is not None:
        record["search"] = asdict(space)
    # The model determines the prompt form and how many positions an image takes up.
    loop.progress(f"loading {run.base}")
    tokenizer = load_tokenizer(base, assume_pretokenizer=assume_pretokenizer)
    model = load_base(base)
    if not model.can_generate():
        raise ModelError(
            f"base model {run.base} is a {type(model).__name__}, which cannot generate text: an encoder "
            'takes rows with labels, {"text": "...", "label": "..."}; or use adalink.training.method.attach in a loop '
            "of your own"
        )
    has_images = any(row.images for row in (*rows.training, *rows.measured))
    images = TrainingImages(base, model, tokenizer) if has_images else None

    def encode(some: Sequence[TrainingRow], origin: Path) -> list[Example]:
        form = prompt_form(model, tokenizer)
        tokens = None if images is None else images.tokens
        encoded = encode_rows(some, tokenizer, settings.max_length, origin, tokens, form)
        check_positions(encoded, model, config.prepended_positions, origin)
        return encoded

    examples, validation = encode(rows.learned, data.path), encode(rows.validation, data.path)
    eval_examples = encode(rows.measured, (eval_data or data).path)
    record["base_fingerprint"] = base_fingerprint(model)
    record["tokenizer_digest"] = digest_tokenizer(tokenizer)
    if images is not None:
        digest = digest_images([*examples, *validation])
        record["images"] = {"train": digest, "eval": digest_images(eval_examples)}
    run.find_checkpoint(record)
    collate = collator(model, tokenizer, images)
    model.to(trainer_arguments(run.checkpoints, settings).device)
    first = config if space is None else candidate_config(config, space, model)
    _check_first_batch(model, first, collate(examples[: settings.batch_size]), run.base)
    parts: dict[str, Any] = {}

    def reply(some: AdaLinkConfig | None) -> list[Reply]:
        loop.progress(f"exact match of the {'base' if some is None else 'adapter'} on {len(rows.measured)} eval rows")
        prepended = 0 if some is None else some.prepended_positions
        return greedy_replies(model, tokenizer, eval_examples, settings.batch_size, images, prepended=prepended)

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
        base_replies = reply(None)
        set_seed(settings.seed)
        with attach(model, config) as attached:
            module = TrainableAdapters(attached)
            if config.init == "gradient" and run.last is None:
                size, seed = settings.batch_size, settings.seed
                directions = find_directions(module, attached, examples, collate, batch_size=size, seed=seed)
                follow_directions(attached, directions)
            loop.progress(f"training on {len(examples)} rows, {settings.max_steps} steps")
            watched = validation or pick(eval_examples, spread(len(eval_examples)))
            lesson = Lesson(
                module, examples, collate, lambda: {"loss": mean_loss(module, watched, collate, settings.batch_size)}
            )
            history = run.train(lesson, settings)
            adapter = run.make_adapter(attached, tokenizer)
            replies = reply(config)
    parts |= {"method": config.as_record(), "settings": settings.as_record()}
    parts["exact_match"] = {"base": share_right(base_replies), "adapter": share_right(replies)}
    labels = None if config.labels is None else config.labels.names
    return run.finish(adapter, history, parts, RepliedRows(rows.measured, replies, base_replies, labels))


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
