"""A training run: an adapter on rows of text, or of images and text, with the Hugging Face ``Trainer``.

The Trainer's module holds the adapters alone, so a checkpoint is adapters and optimizer state, without the base.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from transformers import set_seed

from adalink.runtime.errors import AdapterError, ConfigError, DataError, ModelError
from adalink.runtime.rows.source import RowSource
from adalink.training.adapter_io import check_target, digest_tokenizer, save_adapter, to_adapter
from adalink.training.checkpoints import (
    CheckpointTrainer,
    begin_checkpoints,
    check_fresh,
    last_checkpoint,
    removed_if_useless,
    restore,
    step_of,
)
from adalink.training.classifier_run import train_classifier
from adalink.training.data.images import TrainingImages, digest_images
from adalink.training.data.labelled_rows import has_labels
from adalink.training.data.rows import check_labels, check_positions, encode_rows, find_labels
from adalink.training.data.run_rows import check_files, read_prompts
from adalink.training.device import precision_warning, resolve_device
from adalink.training.evaluation import exact_match
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.method.initialization import find_directions, follow_directions
from adalink.training.models.loading import base_fingerprint, load_base, load_tokenizer
from adalink.training.models.prefix_lm import prompt_form
from adalink.training.models.source import display_name
from adalink.training.models.vision import image_side
from adalink.training.search.search import candidate_config, search
from adalink.training.settings import HeadSettings, LoopOptions, TrainSettings
from adalink.training.trainer import TrainableAdapters, collator, trainer_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from adalink.training.data.rows import Example
    from adalink.training.settings import SearchSettings
    from adalink.training.trainer import Collate

REPORT_FILE = "training.json"


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
    """Train an adapter and write its folder, with a report in ``training.json``.

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
    progress = loop.progress
    out = Path(out).resolve()  # "x/.." has no name of its own, and nothing beside it
    check_target(out)
    if warning := precision_warning(resolve_device(settings.device), settings.precision):
        progress(warning)
    rows, eval_rows, files = read_prompts(data, eval_data, settings.seed, progress)
    if config.labels is not None:
        check_labels(rows, config.labels, data.path)
    elif labels := find_labels(rows):
        config = msgspec.structs.replace(config, labels=labels)
        progress(f"completions are {len(labels.names)} labels: {', '.join(labels.names):.200}")
    record: dict[str, Any] = {
        "base": display_name(base),
        "method": config.as_record(),
        "settings": asdict(settings),
        "data": files,
    }
    if space is not None:
        record["search"] = asdict(space)
    # The model determines the prompt form and how many positions an image takes up.
    progress(f"loading {display_name(base)}")
    tokenizer = load_tokenizer(base, assume_pretokenizer=assume_pretokenizer)
    model = load_base(base)
    if not model.can_generate():
        raise ModelError(
            f"base model {display_name(base)} is a {type(model).__name__}, which cannot generate text: an encoder "
            'takes rows with labels, {"text": "...", "label": "..."}; or use adalink.training.method.attach in a loop '
            "of your own"
        )
    has_images = any(row.images for row in (*rows, *eval_rows))
    images = TrainingImages(base, model, tokenizer) if has_images else None
    encoding = (None if images is None else images.tokens, prompt_form(model, tokenizer))
    eval_file = (eval_data or data).path
    examples = encode_rows(rows, tokenizer, settings.max_length, data.path, *encoding)
    eval_examples = encode_rows(eval_rows, tokenizer, settings.max_length, eval_file, *encoding)
    for encoded, origin in ((examples, data.path), (eval_examples, eval_file)):
        check_positions(encoded, model, config.prepended_positions, origin)
    record["base_fingerprint"] = base_fingerprint(model)
    record["tokenizer_digest"] = digest_tokenizer(tokenizer)
    if images is not None:
        record["images"] = {"train": digest_images(examples), "eval": digest_images(eval_examples)}
    checkpoints = out.parent / f"{out.name}.checkpoints"
    last = None
    if loop.resume:
        last = last_checkpoint(checkpoints, record)
    else:
        check_fresh(checkpoints)
    collate = collator(model, tokenizer, images)
    model.to(trainer_arguments(checkpoints, settings).device)
    first = config if space is None else candidate_config(config, space, model)
    _check_first_batch(model, first, collate(examples[: settings.batch_size]), display_name(base))
    if not loop.resume:
        begin_checkpoints(checkpoints, record)
    with removed_if_useless(checkpoints):
        if space is not None:
            try:
                config, settings, record["search"] = search(
                    model, rows, examples, collate, config, settings, space, checkpoints, progress=progress
                )
            except (ConfigError, DataError):
                shutil.rmtree(checkpoints)  # it cannot be resumed
                raise
        start = time.perf_counter()
        progress(f"exact match of the base on {len(eval_rows)} eval rows")
        accuracy = {"base": exact_match(model, tokenizer, eval_examples, settings.batch_size, images)}
        set_seed(settings.seed)
        with attach(model, config) as attached:
            module = TrainableAdapters(attached)
            if config.init == "gradient" and last is None:
                size, seed = settings.batch_size, settings.seed
                directions = find_directions(module, attached, examples, collate, batch_size=size, seed=seed)
                follow_directions(attached, directions)
            progress(f"training on {len(rows)} rows, {settings.max_steps} steps")
            history = _train(module, examples, collate, settings, checkpoints, last, loop)
            attached.adapters.eval()
            try:
                adapter = to_adapter(attached, display_name(base), tokenizer)
            except AdapterError:
                shutil.rmtree(checkpoints)  # as above
                raise
            progress(f"exact match of the adapter on {len(eval_rows)} eval rows")
            accuracy["adapter"] = exact_match(
                model,
                tokenizer,
                eval_examples,
                settings.batch_size,
                images,
                prepended=config.prepended_positions,
            )
    report = {
        "kit_version": version("adalink-kit"),
        **record,
        "method": config.as_record(),
        "settings": asdict(settings),
        "adapter_digest": adapter.digest,
        "loss_curve": [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry],
        "exact_match": accuracy,
        "wall_seconds": round(time.perf_counter() - start, 1),
    }
    save_adapter(out, adapter, {REPORT_FILE: (json.dumps(report, indent=2) + "\n").encode()})
    shutil.rmtree(checkpoints)
    return report


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


def _train(
    module: TrainableAdapters,
    examples: Sequence[Example],
    collate: Collate,
    settings: TrainSettings,
    checkpoints: Path,
    last: Path | None,
    loop: LoopOptions,
) -> list[dict[str, Any]]:
    """Train to the end, from ``last`` if there is one; returns the Trainer's log."""
    if last is not None and step_of(last) == settings.max_steps:
        return restore(module, last)  # the Trainer would go one step further
    trainer = CheckpointTrainer(
        model=module,
        args=trainer_arguments(
            checkpoints, settings, save_steps=settings.save_steps, save_total_limit=2, disable_tqdm=not loop.show_bar
        ),
        train_dataset=examples,
        data_collator=collate,
        callbacks=list(loop.callbacks),
    )
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    history: list[dict[str, Any]] = trainer.state.log_history
    return history
