"""Train an adapter on rows of text, or of images and text, with the Hugging Face ``Trainer``.

What the Trainer trains holds the adapters alone; so a checkpoint is adapters and optimizer state, not the base.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, set_seed

from adalink.runtime.digest import digest_file
from adalink.runtime.errors import ConfigError, DataError, ModelError, WriteError
from adalink.training.attach import attach
from adalink.training.base_model import base_fingerprint, display_name, load_base, load_tokenizer
from adalink.training.dataset import encode_rows, read_rows
from adalink.training.exact_match import exact_match
from adalink.training.pictures import Pictures, digest_images
from adalink.training.prefix import prompt_form
from adalink.training.search import search
from adalink.training.storage import check_target, save_adapter, to_adapter
from adalink.training.trainer import TrainableAdapters, collator, trainer_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from adalink.training.config import AdaLinkConfig
    from adalink.training.settings import SearchSettings, TrainSettings

REPORT_FILE = "training.json"
_SETTINGS_FILE = "settings.json"


def train(
    base: str | Path,
    data: str | Path,
    eval_data: str | Path,
    out: str | Path,
    config: AdaLinkConfig,
    settings: TrainSettings,
    *,
    space: SearchSettings | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train an adapter and write its folder, with a report in ``training.json``.

    The same arguments on the same machine and versions give the same adapter, also when interrupted and resumed; with
    a search that is so once its trials are done, since how many there are is a matter of time. Checkpoints and the
    trials lie in ``OUT.checkpoints`` and are removed at the end.

    Args:
        base: the base model, as for ``load_base``.
        data: JSONL rows to learn from.
        eval_data: JSONL rows for the exact-match accuracy of base and adapter.
        out: adapter folder to write or replace.
        config: settings of the method.
        settings: how to train.
        space: rates, ranks and activations to choose from first, on rows held out of ``data``; those of ``config`` and
            ``settings`` are then not used. The choice is trained on all rows.
        resume: go on from the last trial or checkpoint of an interrupted run with the same settings.
        callbacks: more Trainer callbacks.
        say: told of a search's progress, a line at a time.

    Returns:
        the report, as written.

    Raises:
        AdaLinkError: data, base, settings or target folder cannot be used.
    """
    out = Path(out)
    check_target(out)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but PyTorch finds no CUDA GPU on this machine: use --device cpu")
    rows, eval_rows = read_rows(data), read_rows(eval_data)
    record: dict[str, Any] = {
        "base": display_name(base),
        "method": asdict(config),
        "settings": asdict(settings),
        "data": {
            "train": {"file": Path(data).name, "sha256": digest_file(Path(data)), "rows": len(rows)},
            "eval": {"file": Path(eval_data).name, "sha256": digest_file(Path(eval_data)), "rows": len(eval_rows)},
        },
    }
    if space is not None:
        record["search"] = asdict(space)
    # How prompts are written, and how many positions an image takes up, is the model's to say.
    model, tokenizer = load_base(base), load_tokenizer(base)
    has_images = any(row.images for row in (*rows, *eval_rows))
    pictures = Pictures(base, model, tokenizer) if has_images else None
    how = (None if pictures is None else pictures.tokens, prompt_form(model, tokenizer))
    examples = encode_rows(rows, tokenizer, settings.max_length, data, *how)
    eval_examples = encode_rows(eval_rows, tokenizer, settings.max_length, eval_data, *how)
    record["base_fingerprint"] = base_fingerprint(model)
    if pictures is not None:
        record["images"] = {"train": digest_images(examples), "eval": digest_images(eval_examples)}
    checkpoints = out.parent / f"{out.name}.checkpoints"
    last = None
    if resume:
        last = _last_checkpoint(checkpoints, record)
    else:
        _check_fresh(checkpoints)
    if not model.can_generate():
        raise ModelError(
            f"base model {display_name(base)} is a {type(model).__name__}, which cannot generate text: train takes "
            "decoders and encoder-decoders; for encoders use adalink.training.attach in a loop of your own"
        )
    if not resume:
        _begin_checkpoints(checkpoints, record)
    collate = collator(model, tokenizer, pictures)
    model.to(trainer_arguments(checkpoints, settings).device)
    if space is not None:
        try:
            config, settings, record["search"] = search(
                model, rows, examples, collate, config, settings, space, checkpoints, say=say
            )
        except (ConfigError, DataError):
            shutil.rmtree(checkpoints)  # it cannot be gone on with
            raise
    start = time.perf_counter()
    accuracy = {"base": exact_match(model, tokenizer, eval_examples, settings.batch_size, pictures)}
    set_seed(settings.seed)
    with attach(model, config) as attached:
        trainer = Trainer(
            model=TrainableAdapters(attached),
            args=trainer_arguments(checkpoints, settings, save_steps=settings.save_steps, save_total_limit=2),
            train_dataset=examples,
            data_collator=collate,
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        attached.adapters.eval()
        accuracy["adapter"] = exact_match(model, tokenizer, eval_examples, settings.batch_size, pictures)
        adapter = to_adapter(attached, display_name(base))
    report = {
        "kit_version": version("adalink-kit"),
        **record,
        "method": asdict(config),
        "settings": asdict(settings),
        "adapter_digest": adapter.digest,
        "loss_curve": [
            {"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry
        ],
        "exact_match": accuracy,
        "wall_seconds": round(time.perf_counter() - start, 1),
    }
    save_adapter(out, adapter, {REPORT_FILE: (json.dumps(report, indent=2) + "\n").encode()})
    shutil.rmtree(checkpoints)
    return report


def _check_fresh(folder: Path) -> None:
    """Refuse to start over where an interrupted run left checkpoints."""
    if folder.exists():
        raise ConfigError(
            f"{folder} holds the checkpoints of an interrupted run: go on with --resume, or remove that folder"
        )


def _begin_checkpoints(folder: Path, record: dict[str, Any]) -> None:
    """Make the checkpoint folder and note in it what the run is."""
    try:
        folder.mkdir(parents=True)
        (folder / _SETTINGS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise WriteError(
            f"checkpoints: cannot write {error.filename or folder}: {error.strerror or error}; choose a writable --out"
        ) from error


def _last_checkpoint(folder: Path, record: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from, if one was written; refuses a run with other settings."""
    settings = folder / _SETTINGS_FILE
    if not settings.is_file():
        raise ConfigError(f"{folder} holds no interrupted run to resume: start one without --resume")
    before = json.loads(settings.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(record))
    if changed := [name for name in {**now, **before} if before.get(name) != now.get(name)]:
        raise ConfigError(
            f"{folder}: the interrupted run had other {' and '.join(changed)}: {before.get(changed[0])}, now "
            f"{now.get(changed[0])}; resume with the same ones, or remove that folder"
        )
    # trainer_state.json is written last: a checkpoint without it was cut off.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
