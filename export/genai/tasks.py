"""Tasks as inputs of an onnxruntime-genai generator: weights of an adapter by the names of the graph's inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.adapter_spec import ACTIVATIONS

Tensors = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True)
class TaskForms:
    """What the tasks of one folder need of its graph.

    Attributes:
        activations: their activations, in the order of ``ACTIVATIONS``; the input ``activation`` is an index of these.
        has_bias: whether one of them has biases.
    """

    activations: tuple[str, ...]
    has_bias: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that a generator must be given for each task."""
        biases = ("down_bias", "up_bias") if self.has_bias else ()
        return ("down", "up", *biases, *(("activation",) if len(self.activations) > 1 else ()))


def forms_of(adapters: Iterable[Adapter]) -> TaskForms:
    """What these tasks need; of no task, what the base needs."""
    configs = [adapter.config for adapter in adapters]
    used = {config.activation for config in configs} or {"identity"}
    return TaskForms(tuple(name for name in ACTIVATIONS if name in used), any(config.bias for config in configs))


def check_task(adapter: Adapter, origin: str) -> None:
    """Check that a task acts on the embeddings of every text position, and nowhere else; raises ``ConfigError``."""
    config = adapter.config
    reason = None
    if config.soft_tokens:
        reason = (
            f"it has a soft prompt of {config.soft_tokens} positions, and a generator counts positions by its tokens"
        )
    elif config.scope != "all":
        reason = f"its scope is {config.scope!r}, and the graph cannot tell prompts from new tokens"
    elif config.input != "embeddings":
        reason = "it looks tokens up in a table of its own: adalink export lora carries it to hosts that read LoRA"
    elif config.head is not None:
        reason = "it has a head, which needs hidden states"
    elif "text" not in config.modalities:
        reason = f"it adapts {', '.join(config.modalities)}, and onnxruntime-genai is given texts alone"
    if reason is not None:
        raise ConfigError(
            f"{origin} cannot go to onnxruntime-genai: {reason}. Leave it out: name the others with --task"
        )


def task_tensors(adapter: Adapter | None, forms: TaskForms, hidden_size: int) -> Tensors:
    """Values of the inputs of one task.

    Args:
        adapter: the adapter; ``None`` for the base model, which a bottleneck of zeros leaves as it is.
        forms: what the folder's graph takes.
        hidden_size: ``d``.

    Returns:
        ``down`` float32 ``(1, r, d)`` and ``up`` ``(1, d, r)``; where the graph takes them ``down_bias`` ``(1, 1, r)``,
        ``up_bias`` ``(1, 1, d)`` and ``activation``, int64 ``(1,)``.
    """
    values: Tensors = {"down": np.zeros((1, hidden_size)), "up": np.zeros((hidden_size, 1))}
    activation = 0
    if adapter is not None:
        values = {name: adapter.weights[f"text.{name}.weight"] for name in ("down", "up")}
        activation = forms.activations.index(adapter.config.activation)
    if forms.has_bias:
        sizes = {"down": values["down"].shape[0], "up": hidden_size}
        given = {} if adapter is None else adapter.weights
        values |= {
            f"{name}_bias": given.get(f"text.{name}.bias", np.zeros(size, np.float32))[None]
            for name, size in sizes.items()
        }
    tensors: Tensors = {name: np.ascontiguousarray(value[None], np.float32) for name, value in values.items()}
    if "activation" in forms.inputs:
        tensors["activation"] = np.array([activation], np.int64)
    return tensors
