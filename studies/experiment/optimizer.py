"""An optimizer under which what a bottleneck sees of an embedding changes slower than what it makes of it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from adalink.training.method.adalink import AdaLink


def make_optimizer(module: nn.Module, arguments: TrainingArguments, lr_ratio: float) -> torch.optim.Optimizer:
    """The Trainer's own optimizer, with a lower rate for every ``down``.

    ``up`` starts at zero, and ``down`` at directions that may mean something. A step of AdamW moves each number by
    about the rate, whatever the gradient, so at one rate for both a row of ``down`` is soon somewhere else. LoRA+
    (arXiv 2402.12354) has the argument for wide models.

    Args:
        module: what is trained; what of it belongs to no ``AdaLink``'s ``down`` learns at the whole rate.
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
