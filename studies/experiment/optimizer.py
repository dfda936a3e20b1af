"""AdamW with a lower learning rate for ``down`` than for ``up``."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from adalink.training.method.adalink import AdaLink


def make_optimizer(module: nn.Module, arguments: TrainingArguments, lr_ratio: float) -> torch.optim.Optimizer:
    """The Trainer's own optimizer, with a lower rate for every ``down``.

    ``up`` starts at zero, ``down`` at chosen directions. AdamW moves each number by about the rate in a step, whatever
    the gradient. At one rate for both, ``down`` soon leaves its directions. LoRA+ (arXiv 2402.12354) has the argument
    for wide models.

    Args:
        module: what is trained; all but the ``down`` of an ``AdaLink`` learns at the full rate.
        arguments: of ``trainer_arguments``.
        lr_ratio: the rate of the others over that of ``down``.
    """
    downs = [weight for part in module.modules() if isinstance(part, AdaLink) for weight in part.down.parameters()]
    slow = {id(weight) for weight in downs}
    others = [weight for weight in module.parameters() if weight.requires_grad and id(weight) not in slow]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    groups = [{"params": others}, {"params": downs, "lr": arguments.learning_rate / lr_ratio}]
    made: torch.optim.Optimizer = kind(
        [group for group in groups if group["params"]], weight_decay=arguments.weight_decay, **options
    )
    return made
