"""A training run of a task with labels: an adapter and a head on an encoder, with the Hugging Face ``Trainer``."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from transformers import set_seed

from adalink.runtime.arrays import Array
from adalink.runtime.errors import AdapterError, ConfigError, DataError, ModelError
from adalink.runtime.storage.head_spec import REGRESSION, TOKENS, Head
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
from adalink.training.classifier import LabelCollator, LabelledExample, TrainableClassifier, encode_labelled
from adalink.training.classifier_metrics import measure
from adalink.training.data.labelled_rows import check_labels, find_labels
from adalink.training.data.run_rows import read_labelled
from adalink.training.device import precision_warning, resolve_device
from adalink.training.label_texts import check_label_texts, label_vectors, place
from adalink.training.method.attach import attach
from adalink.training.models.loading import base_fingerprint, load_base, load_tokenizer, max_positions
from adalink.training.models.sentence_files import read_pooling
from adalink.training.models.source import display_name
from adalink.training.settings import HeadSettings, LoopOptions, TrainSettings
from adalink.training.trainer import trainer_arguments

if TYPE_CHECKING:
    from adalink.runtime.rows.source import RowSource
    from adalink.training.method.config import AdaLinkConfig

REPORT_FILE = "training.json"


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
    out = Path(out).resolve()
    check_target(out)
    if warning := precision_warning(resolve_device(settings.device), settings.precision):
        loop.progress(warning)
    if config.init == "gradient" and not options.alone:
        raise ConfigError(
            "init is 'gradient', which needs completions: choose kaiming or centered for rows with labels"
        )
    kind, rows, eval_rows, files = read_labelled(data, eval_data, options.problem_type, settings.seed, loop.progress)
    labels = find_labels(kind, rows, data.path)
    if options.kind == "none":
        has_bottleneck = isinstance(config.rank, dict) or config.rank > 0
        check_label_texts(kind, has_adapter=not options.alone and (has_bottleneck or config.soft_tokens > 0))
    loop.progress(f"loading {display_name(base)}")
    tokenizer, model = load_tokenizer(base), load_base(base)
    if model.can_generate() and not model.config.is_encoder_decoder:
        raise ModelError(
            f"base model {display_name(base)} is a {type(model).__name__}, a decoder: rows with labels are for "
            'encoders; give it rows {"prompt": "...", "completion": "..."}, or make them with --template'
        )
    prepended = 0 if options.alone else config.prepended_positions
    head = _make_head(base, tokenizer, model, (kind, labels), settings, options, prepended)
    eval_file = (eval_data or data).path
    check_labels(head, eval_rows, eval_file)
    alone = {"rank": 0, "activation": "identity", "bias": False, "dropout": 0.0, "init": "kaiming", "soft_tokens": 0}
    config = msgspec.structs.replace(config, head=head, **(alone if options.alone else {}))
    examples, eval_examples = (encode_labelled(some, tokenizer, head) for some in (rows, eval_rows))
    for some, origin in ((examples, data.path), (eval_examples, eval_file)):
        if cut := sum(example.is_cut for example in some):
            loop.progress(f"{origin}: {cut} of {len(some)} texts are longer than {head.max_tokens} tokens, and are cut")
    record: dict[str, Any] = {
        "base": display_name(base),
        "method": config.as_record(),
        "settings": {**asdict(settings), "head": options.kind, "head_lr": options.lr},
        "data": files,
        "base_fingerprint": base_fingerprint(model),
        "tokenizer_digest": digest_tokenizer(tokenizer),
    }
    checkpoints = out.parent / f"{out.name}.checkpoints"
    last = None
    if loop.resume:
        last = last_checkpoint(checkpoints, record)
    else:
        check_fresh(checkpoints)
        begin_checkpoints(checkpoints, record)
    model.to(trainer_arguments(checkpoints, settings).device)
    start = time.perf_counter()
    with removed_if_useless(checkpoints):
        collate = LabelCollator(head, _pad_token(tokenizer))
        vectors = None if options.kind == "linear" else label_vectors(model, tokenizer, head, examples, collate)
        set_seed(settings.seed)
        with attach(model, config) as attached:
            if vectors is not None:
                place(attached, vectors)
            module = TrainableClassifier(attached)
            scaled, mean, spread = _standardized(examples) if kind == REGRESSION else (examples, 0.0, 1.0)
            loop.progress(f"training on {len(rows)} rows with {len(labels)} labels, {settings.max_steps} steps")
            history = _train(module, scaled, collate, settings, options, checkpoints, last, loop)
            if kind == REGRESSION:
                _unscale(module, mean, spread)
            attached.adapters.eval()
            try:
                adapter = to_adapter(attached, display_name(base), tokenizer)
            except AdapterError:
                shutil.rmtree(checkpoints)  # it cannot be resumed
                raise
            loop.progress(f"measuring on {len(eval_rows)} eval rows")
            scores = predict(module, eval_examples, collate, settings.batch_size)
            evaluation = measure(head, eval_rows, eval_examples, scores, rows)
    report = {
        "kit_version": version("adalink-kit"),
        **record,
        "adapter_digest": adapter.digest,
        "loss_curve": [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry],
        "evaluation": evaluation,
        "wall_seconds": round(time.perf_counter() - start, 1),
    }
    save_adapter(out, adapter, {REPORT_FILE: (json.dumps(report, indent=2) + "\n").encode()})
    shutil.rmtree(checkpoints)
    return report


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


def _pad_token(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0


def _standardized(examples: Sequence[LabelledExample]) -> tuple[list[LabelledExample], float, float]:
    """Examples whose numbers have mean 0 and spread 1, and what they had."""
    values = np.array([example.target for example in examples], np.float64)
    mean, spread = float(values.mean()), float(values.std())
    if spread == 0.0:
        raise DataError(f"all rows have the number {mean}: there is nothing to learn")
    scaled = [
        replace(example, target=float(value)) for example, value in zip(examples, (values - mean) / spread, strict=True)
    ]
    return scaled, mean, spread


@torch.no_grad()
def _unscale(module: TrainableClassifier, mean: float, spread: float) -> None:
    """Let the head give the rows' own numbers."""
    module.head.weight.mul_(spread)
    module.head.bias.mul_(spread).add_(mean)


@torch.no_grad()
def predict(
    module: TrainableClassifier, examples: Sequence[LabelledExample], collate: LabelCollator, batch_size: int
) -> list[Array]:
    """Scores of each example, float32 with shape ``(labels,)``, or ``(tokens, labels)``."""
    module.eval()
    device = next(module.head.parameters()).device
    scores: list[Array] = []
    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        batch = {name: tensor.to(device) for name, tensor in collate(rows).items() if name != "labels"}
        values = module.scores(**batch).float().cpu().numpy()
        scores += [value[: len(row.ids)] if value.ndim == 2 else value for value, row in zip(values, rows, strict=True)]
    return scores


def _train(
    module: TrainableClassifier,
    examples: Sequence[LabelledExample],
    collate: LabelCollator,
    settings: TrainSettings,
    options: HeadSettings,
    checkpoints: Path,
    last: Path | None,
    loop: LoopOptions,
) -> list[dict[str, Any]]:
    """Train to the end, from ``last`` if there is one; returns the Trainer's log."""
    if last is not None and step_of(last) == settings.max_steps:
        return restore(module, last)  # the Trainer would go one step further
    rates = ((module.adapters, settings.lr), (module.head, options.lr))
    learned = [([one for one in part.parameters() if one.requires_grad], lr) for part, lr in rates]
    groups = [{"params": parameters, "lr": lr} for parameters, lr in learned if parameters]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    trainer = CheckpointTrainer(
        model=module,
        args=trainer_arguments(
            checkpoints, settings, save_steps=settings.save_steps, save_total_limit=2, disable_tqdm=not loop.show_bar
        ),
        train_dataset=examples,
        data_collator=collate,
        callbacks=list(loop.callbacks),
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    history: list[dict[str, Any]] = trainer.state.log_history
    return history
