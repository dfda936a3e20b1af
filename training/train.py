"""Train an adapter on rows of text, or of images and text, with the Hugging Face ``Trainer``.

The Trainer sees a module that holds the adapters alone; so a checkpoint is adapters and optimizer state, not the base.
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
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from adalink.runtime.digest import digest_file
from adalink.runtime.errors import ConfigError, ModelError, WriteError
from adalink.training.attach import Attached, attach
from adalink.training.base_model import display_name, load_base, load_tokenizer
from adalink.training.config import AdaLinkConfig
from adalink.training.dataset import IGNORED_LABEL, encode_rows, end_token, pad_decoder, pad_encoder_decoder, read_rows
from adalink.training.exact_match import exact_match
from adalink.training.pictures import Pictures, digest_images
from adalink.training.settings import TrainSettings
from adalink.training.storage import check_target, save_adapter, to_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from adalink.training.dataset import Example

REPORT_FILE = "training.json"
_SETTINGS_FILE = "settings.json"
_WARMUP_SHARE = 0.05


class TrainableAdapters(nn.Module):
    """The adapters as a module whose forward pass is the frozen base's loss.

    Only the adapters are registered: the base is reached through ``attached``, which is no module.
    """

    def __init__(self, attached: Attached) -> None:
        super().__init__()
        self.adapters = attached.adapters
        self.attached = attached

    def forward(self, labels: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean loss over the target tokens of a batch made by ``adalink.training.dataset``.

        Args:
            labels: int64 with shape ``(batch, seq)``, -100 but on targets.
            inputs: what the base takes, each with shape ``(batch, seq)``; beside them ``pixel_values`` of its images.
        """
        base = self.attached.model
        if base.config.is_encoder_decoder:
            return {"loss": base(**inputs, labels=labels).loss}
        is_target = labels != IGNORED_LABEL
        # Rows end in the last column: the head is needed only from the token before the first target on.
        kept = int(is_target.any(dim=0).sum())
        with self.attached.positions(prompt_mask=~is_target):
            logits = base(**inputs, use_cache=False, logits_to_keep=kept + 1).logits
        loss = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, -kept:].flatten(), ignore_index=IGNORED_LABEL
        )
        return {"loss": loss}


def train(
    base: str | Path,
    data: str | Path,
    eval_data: str | Path,
    out: str | Path,
    config: AdaLinkConfig,
    settings: TrainSettings,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train an adapter and write its folder, with a report in ``training.json``.

    The same arguments on the same machine and versions give the same adapter, also when interrupted and resumed.
    Checkpoints lie in ``OUT.checkpoints`` and are removed at the end.

    Args:
        base: the base model, as for ``load_base``.
        data: JSONL rows to learn from.
        eval_data: JSONL rows for the exact-match accuracy of base and adapter.
        out: adapter folder to write or replace.
        config: settings of the method.
        settings: how to train.
        resume: go on from the last checkpoint of an interrupted run with the same settings.
        callbacks: more Trainer callbacks.

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
    tokenizer = load_tokenizer(base)
    model = pictures = None
    if any(row.images for row in (*rows, *eval_rows)):
        # How many positions an image takes up is the model's to say.
        model = load_base(base)
        pictures = Pictures(base, model, tokenizer)
    tokens = None if pictures is None else pictures.tokens
    examples = encode_rows(rows, tokenizer, settings.max_length, data, tokens)
    eval_examples = encode_rows(eval_rows, tokenizer, settings.max_length, eval_data, tokens)
    if pictures is not None:
        record["images"] = {"train": digest_images(examples), "eval": digest_images(eval_examples)}
    checkpoints = out.parent / f"{out.name}.checkpoints"
    last = None
    if resume:
        last = _last_checkpoint(checkpoints, record)
    else:
        _check_fresh(checkpoints)
    model = model or load_base(base)
    if not model.can_generate():
        raise ModelError(
            f"base model {display_name(base)} is a {type(model).__name__}, which cannot generate text: train takes "
            "decoders and encoder-decoders; for encoders use adalink.training.attach in a loop of your own"
        )
    if not resume:
        _begin_checkpoints(checkpoints, record)
    arguments = _trainer_arguments(checkpoints, settings)
    arguments._n_gpu = 1  # on several GPUs the Trainer would replicate the adapters, and the hooks only know the first
    model.to(arguments.device)
    start = time.perf_counter()
    accuracy = {"base": exact_match(model, tokenizer, eval_examples, settings.batch_size, pictures)}
    set_seed(settings.seed)
    with attach(model, config) as attached:
        trainer = Trainer(
            model=TrainableAdapters(attached),
            args=arguments,
            train_dataset=examples,
            data_collator=_collator(model, tokenizer, pictures),
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        attached.adapters.eval()
        accuracy["adapter"] = exact_match(model, tokenizer, eval_examples, settings.batch_size, pictures)
        adapter = to_adapter(attached, display_name(base))
    report = {
        "kit_version": version("adalink-kit"),
        **record,
        "base_fingerprint": adapter.config.base_fingerprint,
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


def _trainer_arguments(checkpoints: Path, settings: TrainSettings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_steps=round(_WARMUP_SHARE * settings.max_steps),
        weight_decay=0.0,
        logging_steps=max(1, settings.max_steps // 20),
        save_steps=settings.save_steps,
        save_total_limit=2,
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        remove_unused_columns=False,
        report_to="none",
    )


def _collator(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pictures: Pictures | None
) -> Callable[[Sequence[Example]], dict[str, torch.Tensor]]:
    pad = end_token(tokenizer)
    pad_rows = pad_encoder_decoder if model.config.is_encoder_decoder else pad_decoder

    def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        return {**pad_rows(examples, pad), **({} if pictures is None else pictures.inputs(examples))}

    return collate


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
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise ConfigError(
            f"{folder}: the interrupted run had other {' and '.join(changed)}: {before.get(changed[0])}, now "
            f"{now[changed[0]]}; resume with the same ones, or remove that folder"
        )
    # trainer_state.json is written last: a checkpoint without it was cut off.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
