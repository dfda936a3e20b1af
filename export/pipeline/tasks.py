"""Tasks as inputs of the graph before a base: weights of an adapter by the names of the inputs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.adapter_spec import ACTIVATIONS

# The same in every folder: a task of another one is never computed otherwise.
INPUTS = ("down", "up", "down_bias", "up_bias", "activation")

Tensors = dict[str, npt.NDArray[np.generic]]


def activations_of(adapters: Iterable[Adapter]) -> tuple[str, ...]:
    """Activations that these tasks use, in the order of ``ACTIVATIONS``; of no task, the identity."""
    used = {adapter.config.activation for adapter in adapters} or {"identity"}
    return tuple(name for name in ACTIVATIONS if name in used)


def check_task(adapter: Adapter, origin: str, host: str) -> None:
    """Check that a task acts on the embeddings of every text position, and nowhere else; raises ``ConfigError``."""
    config = adapter.config
    reason = None
    if config.soft_tokens:
        reason = (
            f"it has a soft prompt of {config.soft_tokens} positions, and a generator counts positions by its tokens"
        )
    elif config.kv_prefix is not None:
        reason = "it has a KV prefix, and a generator begins with an empty cache"
    elif config.scope != "all":
        reason = f"its scope is {config.scope!r}, and the graph cannot tell prompts from new tokens"
    elif config.input != "embeddings":
        reason = "it looks tokens up in a table of its own: adalink export lora carries it to hosts that read LoRA"
    elif config.head is not None:
        reason = "it has a head, which needs hidden states"
    elif "text" not in config.modalities:
        reason = f"it adapts {', '.join(config.modalities)}, and {host} is given texts alone"
    if reason is not None:
        raise ConfigError(f"{origin} cannot go to {host}: {reason}. Leave it out: name the others with --task")


def left_out(adapter: Adapter) -> tuple[str, ...]:
    """Parts of a task that stay in the kit: its text is generated without them."""
    config = adapter.config
    weights = (f"weights for {name}" for name in config.modalities if name != "text")
    return (*weights, *(("labels",) if config.labels is not None else ()))


def task_tensors(adapter: Adapter | None, activations: tuple[str, ...], hidden_size: int) -> Tensors:
    """Values of the inputs of one task.

    Args:
        adapter: the adapter; ``None`` for the base model, which a bottleneck of zeros leaves as it is.
        activations: those that the folder's graph computes.
        hidden_size: ``d``.

    Returns:
        ``down`` float32 ``(1, r, d)``, ``up`` ``(1, d, r)``, ``down_bias`` ``(1, 1, r)``, ``up_bias`` ``(1, 1, d)``,
        zeros for an adapter without, and ``activation`` int64 ``(1,)``, an index of ``ACTIVATIONS``.
    """
    values: Tensors = {"down": np.zeros((1, hidden_size)), "up": np.zeros((hidden_size, 1))}
    if adapter is not None:
        values = {name: adapter.weights[f"text.{name}.weight"] for name in ("down", "up")}
    given = {} if adapter is None else adapter.weights
    for name, size in {"down": values["down"].shape[0], "up": hidden_size}.items():
        values[f"{name}_bias"] = given.get(f"text.{name}.bias", np.zeros(size, np.float32))[None]
    tensors: Tensors = {name: np.ascontiguousarray(value[None], np.float32) for name, value in values.items()}
    activation = activations[0] if adapter is None else adapter.config.activation
    return {**tensors, "activation": np.array([ACTIVATIONS.index(activation)], np.int64)}
