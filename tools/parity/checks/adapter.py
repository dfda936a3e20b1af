"""Level 1: a task, through the bank and through its own graph, against the adapter in float64.

Two sweeps: the whole vocabulary and every single weight. On text an adapter is a function of the token, so the
vocabulary is its whole domain. But a sum over ``d`` terms hides a small change of one weight within its rounding error.
So the second sweep feeds multiples of the unit vectors, where the inner sum has one term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adalink.export.adapter.error_bound import UNDERFLOW, UNIT_ROUNDOFF, Float64
from adalink.export.adapter.session import OpenGraph
from adalink.runtime.arrays import Array
from adalink.runtime.deployment import Deployment
from adalink.runtime.storage.adapter import SOFT_PROMPT_NAME, Adapter, AdapterConfig
from adalink.runtime.storage.adapter_spec import settings_of
from adalink.runtime.storage.kv_prefix_spec import KV_PREFIX_NAME
from adalink.runtime.storage.manifest import Task
from adalink.runtime.storage.safetensors import as_float32, as_stored
from adalink.tools.parity.reference.float64_adapter import exact_adapter
from adalink.tools.parity.report import Check, at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adalink.tools.parity.reference.model import Reference

# Embeddings (1, tokens, d) in the base's dtype, their modality, and their token ids (1, tokens) if any -> adapted
# embeddings.
Adapt = Callable[[Array, str, Array | None], Array]

_BLOCK_ROWS = 4096
# Multiples of the unit vectors: both signs, so that an activation with a dead side shows its weights.
_PROBE_SCALES = (1.0, -1.0)


def check_contract(name: str, task: Task, adapter: Adapter, tokenizer_digest: str = "") -> Check:
    """The manifest's entry of a task against its adapter, and the tokenizer of its training against the deployment's.

    Args:
        name: the task.
        task: its entry.
        adapter: its adapter.
        tokenizer_digest: digest of the deployment's tokenizer; empty if it is unknown, as an older adapter's is.
    """
    config = adapter.config
    fields = {
        "adapter_digest": (task.adapter_digest, adapter.digest),
        **{key: (value, getattr(config, key)) for key, value in settings_of(task).items()},
    }
    if tokenizer_digest and config.tokenizer_digest:
        fields["tokenizer_digest"] = (tokenizer_digest, config.tokenizer_digest)
    wrong = [f"{key} is {ours!r}, the adapter's {theirs!r}" for key, (ours, theirs) in fields.items() if ours != theirs]
    return at_most(f"adapter/{name}/contract", len(wrong), 0, "; ".join(wrong) or "digest, rank, scope as trained")


def check_vocabulary(name: str, path: str, adapt: Adapt, deployment: Deployment, adapter: Adapter) -> Check:
    """Every row of the embedding table through one implementation of a task.

    Args:
        name: the task.
        path: name of the implementation: ``bank`` or ``graph``.
        adapt: the implementation.
        deployment: the deployment, for its table.
        adapter: the task's adapter.
    """
    base = deployment.manifest.base
    modality, dtype = base.modalities[0], base.embedding_dtype

    def blocks() -> Iterator[tuple[int, Float64, Float64]]:
        for start in range(0, base.vocab_size, _BLOCK_ROWS):
            ids = np.arange(start, min(start + _BLOCK_ROWS, base.vocab_size))[None]
            embeds = deployment.input_embeddings(ids)
            yield start, to_float64(embeds[0], dtype), to_float64(adapt(embeds, modality, ids)[0], dtype)

    ratio, row, column = _worst(blocks(), adapter, modality, dtype)
    token = _token_text(deployment, row)
    detail = f"measured / bound over {base.vocab_size} tokens; worst: token {row}{token}, component {column}"
    return at_most(f"adapter/{name}/{path}-vocabulary", ratio, 1.0, detail)


def check_table(deployment: Deployment, reference: Reference) -> Check:
    """The deployment's embedding table equals the outputs of the model's embedding module, rounded to its dtype."""
    base, excess = deployment.manifest.base, 0.0
    for start in range(0, base.vocab_size, _BLOCK_ROWS):
        ids = np.arange(start, min(start + _BLOCK_ROWS, base.vocab_size))
        expected = reference.embeddings(ids)
        received = to_float64(deployment.input_embeddings(ids[None])[0], base.embedding_dtype)
        allowed = np.zeros(())
        if base.embedding_dtype != "float32":  # one rounding, and one more of the scale that some models multiply by
            allowed = 2 * UNIT_ROUNDOFF[base.embedding_dtype] * np.abs(expected) + UNDERFLOW[base.embedding_dtype]
        excess = np.maximum(excess, (np.abs(received - expected) - allowed).max())  # NaN stays
    return at_most("base/embeddings", float(excess), 0.0, "deviation from the module's own output beyond rounding")


def check_fold(name: str, fold: str, deployment: Deployment, adapter: Adapter) -> Check:
    """Every token through the folded form of a task, which the deployment uses for token ids."""
    base = deployment.manifest.base

    def blocks() -> Iterator[tuple[int, Float64, Float64]]:
        for start in range(0, base.vocab_size, _BLOCK_ROWS):
            ids = np.arange(start, min(start + _BLOCK_ROWS, base.vocab_size))[None]
            embeds, adapted = deployment.input_embeddings(ids)[0], deployment.input_embeddings(ids, tasks=name)[0]
            yield start, to_float64(embeds, base.embedding_dtype), to_float64(adapted, base.embedding_dtype)

    ratio, row, column = _worst(blocks(), adapter, base.modalities[0], base.embedding_dtype)
    detail = f"measured / bound of the folded form ({fold}) over {base.vocab_size} tokens; worst: token {row}, "
    return at_most(f"adapter/{name}/fold-vocabulary", ratio, 1.0, f"{detail}component {column}")


def check_weights(name: str, path: str, adapt: Adapt, adapter: Adapter, dtype: str) -> Check:
    """Multiples of every unit vector through one implementation of a task, for each modality of the adapter."""
    width = adapter.config.hidden_size
    worst, detail = 0.0, ""
    for modality in adapter.config.modalities:
        for scale in _PROBE_SCALES:
            x = np.eye(width) * scale
            adapted = to_float64(adapt(from_float64(x, dtype)[None], modality, None)[0], dtype)
            ratio, row, column = _worst(iter([(0, x, adapted)]), adapter, modality, dtype)
            if not ratio <= worst:
                worst = ratio
                detail = f"; worst: {modality}, {scale:+g} times unit vector {row}, component {column}"
    return at_most(f"adapter/{name}/{path}-weights", worst, 1.0, f"measured / bound over the unit vectors{detail}")


def check_soft_prompt(name: str, graph: bytes, deployment: Deployment, adapter: Adapter) -> Check:
    """The soft prompt of a task graph, in every row: the adapter's vectors, rounded to the base's dtype."""
    base, soft_tokens = deployment.manifest.base, adapter.config.soft_tokens
    ids = np.arange(2)[:, None]
    embeds = to_float64(deployment.input_embeddings(ids), base.embedding_dtype)
    others = _other_inputs(adapter.config, embeds, 0, ids)
    received = OpenGraph(graph, base.embedding_dtype).run(embeds, others, soft_tokens)
    stored = to_float64(as_stored(adapter.weights[SOFT_PROMPT_NAME], base.embedding_dtype), base.embedding_dtype)
    differing = int((received[:, :soft_tokens] != stored).sum())
    detail = f"numbers of {soft_tokens} vectors that the graph puts before the text and that are not the adapter's"
    return at_most(f"adapter/{name}/graph-soft-prompt", differing, 0, detail)


def check_kv_prefix(name: str, deployment: Deployment, adapter: Adapter) -> Check:
    """The KV prefix with which the deployment begins a row: the adapter's, rounded to the base's dtype, bit for bit."""
    base = deployment.manifest.base
    received = deployment.kv_prefix(name)
    differing, tokens = float("inf"), adapter.weights[KV_PREFIX_NAME].shape[3]
    if received is not None and base.cache is not None:
        stored = to_float64(as_stored(adapter.weights[KV_PREFIX_NAME], base.embedding_dtype), base.embedding_dtype)
        found = to_float64(received, base.embedding_dtype)
        # Key and value of each layer in turn, as the base graph names its inputs.
        pairs = [(layer, part) for layer in range(base.cache.layers) for part in (0, 1)]
        differing = sum(float((found[index] != stored[pair]).sum()) for index, pair in enumerate(pairs))
    detail = f"numbers of keys and values at {tokens} positions before the text that are not the adapter's"
    return at_most(f"adapter/{name}/kv-prefix", differing, 0, detail)


def through_bank(deployment: Deployment, name: str) -> Adapt:
    """A task as the deployment computes it: from token ids if any, for which a device has its own graphs.

    Token ids of a folded task are left out: its folded form has a separate check.
    """
    known = deployment.manifest.base.modalities
    task = deployment.manifest.tasks[name]

    def adapt(embeds: Array, modality: str, ids: Array | None) -> Array:
        if ids is not None and (task.input == "ids" or task.fold is None):
            return deployment.input_embeddings(ids, tasks=name)
        indices = None if modality == known[0] else np.full(embeds.shape[:2], known.index(modality), np.int64)
        return deployment.input_embeddings(inputs_embeds=embeds, tasks=name, modality=indices)

    return adapt


def through_graph(graph: bytes, config: AdapterConfig, dtype: str) -> Adapt:
    """A task as other hosts compute it, by its graph; positions of other modalities bypass the graph."""
    opened = OpenGraph(graph, dtype)

    def adapt(embeds: Array, modality: str, ids: Array | None) -> Array:
        if modality not in config.modalities:
            return embeds
        others = _other_inputs(config, embeds, config.modalities.index(modality), ids)
        adapted = opened.run(to_float64(embeds, dtype), others, config.soft_tokens)
        return from_float64(adapted[:, config.soft_tokens :], dtype)

    return adapt


def _other_inputs(config: AdapterConfig, embeds: Array, modality: int, ids: Array | None) -> dict[str, Array]:
    """Inputs of a task graph beside embeddings; ``modality`` is an index in the adapter's list."""
    if config.input == "ids":
        return {} if ids is None else {"input_ids": ids}
    return {"modality": np.full(embeds.shape[:2], modality)} if len(config.modalities) > 1 and config.rank else {}


def as_numbers(values: Array, dtype: str) -> Array:
    """Values of the deployment as floating-point numbers; bfloat16 comes as its bits."""
    return as_float32(values) if dtype == "bfloat16" else values


def to_float64(values: Array, dtype: str) -> Float64:
    """Values of the deployment as float64."""
    return as_numbers(values, dtype).astype(np.float64)


def from_float64(values: npt.NDArray[np.float64], dtype: str) -> Array:
    """The reverse, for values that are exact in ``dtype``."""
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def _worst(
    blocks: Iterator[tuple[int, Float64, Float64]], adapter: Adapter, modality: str, dtype: str
) -> tuple[float, int, int]:
    """Largest ``|measured - exact| / bound`` with its row and component; infinite where the bound is 0 and missed."""
    worst = (0.0, 0, 0)
    for start, embeds, adapted in blocks:
        exact = exact_adapter(adapter, modality, embeds, dtype, np.arange(start, start + len(embeds)))
        deviation = np.abs(adapted - exact.output)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(deviation == 0, 0.0, deviation / exact.bound)
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
        row, column = np.unravel_index(int(ratio.argmax()), ratio.shape)
        if ratio[row, column] > worst[0]:
            worst = (float(ratio[row, column]), start + int(row), int(column))
    return worst


def _token_text(deployment: Deployment, token: int) -> str:
    if deployment.manifest.base.tokenizer is None:
        return ""
    decode: Callable[[list[int]], str] = deployment.tokenizer.decode
    return f" {decode([token])!r}"
