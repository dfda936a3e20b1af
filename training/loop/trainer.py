"""Inputs of the Hugging Face ``Trainer``: the adapters as a module, the collator, and the training arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import TrainingArguments

from adalink.training.data.batches import IGNORED_LABEL, pad_decoder, pad_encoder_decoder
from adalink.training.data.rows import end_token
from adalink.training.models.prefix_lm import prompt_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from adalink.training.data.images import TrainingImages
    from adalink.training.data.rows import Example
    from adalink.training.method.attach import AdaLinkModel

    Collate = Callable[[Sequence[Example]], dict[str, torch.Tensor]]

_WARMUP_SHARE = 0.05
_CURVE_POINTS = 20


class TrainableAdapters(nn.Module):
    """The adapters as a module; its forward pass computes the frozen base's loss.

    Only the adapters are registered: ``attached``, which holds the base, is not a module.
    """

    def __init__(self, attached: AdaLinkModel) -> None:
        super().__init__()
        self.adapters = attached.adapters
        self.attached = attached

    def forward(self, labels: torch.Tensor, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean loss over the target tokens of a batch made by ``adalink.training.data.rows``.

        Args:
            labels: int64 with shape ``(batch, seq)``, -100 but on targets.
            inputs: inputs of the base, each with shape ``(batch, seq)``, and those for images.
        """
        logits, targets = self._predict(labels, inputs)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL)
        return {"loss": loss}

    @torch.no_grad()
    def row_losses(self, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Mean loss over the target tokens of each row, float32 with shape ``(batch,)``; arguments as ``forward``'s."""
        logits, targets = self._predict(labels, inputs)
        losses = functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=IGNORED_LABEL, reduction="none"
        )  # fmt: skip
        return losses.sum(dim=1) / (targets != IGNORED_LABEL).sum(dim=1)

    def _predict(self, labels: torch.Tensor, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 logits ``(batch, kept, V)`` and their target tokens, ``(batch, kept)``."""
        base = self.attached.model
        if base.config.is_encoder_decoder:
            return base(**inputs, labels=labels).logits.float(), labels
        is_target = labels != IGNORED_LABEL
        # Rows end in the last column, so logits are needed only from the token before the first target on.
        kept = int(is_target.any(dim=0).sum())
        with self.attached.positions(prompt_mask=~is_target):
            logits = base(**inputs, use_cache=False, logits_to_keep=kept + 1).logits
        return logits[:, :-1].float(), labels[:, -kept:]


class Trainable(Protocol):
    """Adapters as a module, on rows of any kind."""

    attached: AdaLinkModel

    def row_losses(self, labels: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Mean loss over the targets of each row, float32 with shape ``(batch,)``."""
        ...

    def train(self, mode: bool = True) -> Any:
        """As of a module."""
        ...


def batches(
    examples: Sequence[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    batch_size: int,
    device: torch.device,
) -> Iterator[dict[str, torch.Tensor]]:
    """Examples in batches on a device, in their order."""
    for start in range(0, len(examples), batch_size):
        yield {name: tensor.to(device) for name, tensor in collate(examples[start : start + batch_size]).items()}


@torch.no_grad()
def mean_loss(
    module: Trainable, examples: Sequence[Any], collate: Callable[[Any], dict[str, torch.Tensor]], batch_size: int
) -> float:
    """Mean over rows of the mean loss over a row's targets, without dropout; uses no random numbers."""
    module.train(False)
    total = 0.0
    for batch in batches(examples, collate, batch_size, module.attached.model.device):
        total += float(module.row_losses(**batch).double().sum())
    return total / len(examples)


class Schedule(Protocol):
    """The settings that ``TrainSettings`` and a run of a study share."""

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        ...

    @property
    def max_steps(self) -> int:
        """Optimizer steps."""
        ...

    @property
    def batch_size(self) -> int:
        """Rows a step."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the order of rows."""
        ...

    @property
    def device(self) -> str:
        """``"cpu"`` to use no GPU."""
        ...

    @property
    def precision(self) -> str:
        """``"float32"``, or ``"bfloat16"`` for steps under autocast."""
        ...


def trainer_arguments(folder: str | Path, schedule: Schedule, **more: Any) -> TrainingArguments:
    """Arguments of a ``Trainer``: AdamW without weight decay, a warm-up over 5 % of the steps, linear decay.

    Args:
        folder: checkpoint folder.
        schedule: rate, steps, batch size, seed, device and precision.
        more: additional ``TrainingArguments``.
    """
    is_bfloat16 = schedule.precision == "bfloat16"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.max_steps,
        per_device_train_batch_size=schedule.batch_size,
        learning_rate=schedule.lr,
        lr_scheduler_type="linear",
        warmup_steps=round(_WARMUP_SHARE * schedule.max_steps),
        weight_decay=0.0,
        logging_steps=max(1, schedule.max_steps // _CURVE_POINTS),
        seed=schedule.seed,
        bf16=is_bfloat16,
        # By default the Trainer takes bf16 as a request for a GPU, and refuses if there is none.
        use_cpu=schedule.device == "cpu" or (is_bfloat16 and not torch.cuda.is_available()),
        remove_unused_columns=False,
        dataloader_pin_memory=schedule.device != "cpu" and torch.cuda.is_available(),  # without a GPU PyTorch warns
        report_to="none",
        **more,
    )
    arguments._n_gpu = 1  # with several GPUs the Trainer would replicate the module, and the hooks are on the first
    return arguments


def collator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, images: TrainingImages | None) -> Collate:
    """A function that makes a batch of examples for ``TrainableAdapters`` of this base."""
    pad = end_token(tokenizer)
    pad_rows = pad_encoder_decoder if model.config.is_encoder_decoder else pad_decoder

    def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        batch = pad_rows(examples, pad)
        batch |= prompt_inputs(model, batch["labels"] == IGNORED_LABEL)
        return batch if images is None else images.join(batch, examples)

    return collate
