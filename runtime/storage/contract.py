"""Compatibility of adapter and base: one check for deployments, export and PyTorch models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from adalink.runtime.errors import ContractError
from adalink.runtime.storage.adapter import SOFT_PROMPT_NAME, TABLE_NAME, Adapter
from adalink.runtime.storage.kv_prefix_spec import KV_PREFIX_NAME
from adalink.runtime.storage.safetensors import as_float32, as_stored

if TYPE_CHECKING:
    from adalink.runtime.storage.manifest import Cache


class AdapterBase(Protocol):
    """The base in a compatibility check: ``$.base`` of a manifest, or a model in training."""

    @property
    def name(self) -> str:
        """Display name."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of the input embedding matrix."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width ``d`` of the embeddings."""
        ...

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""
        ...

    @property
    def embedding_dtype(self) -> str:
        """Dtype of the input embeddings."""
        ...

    @property
    def max_positions(self) -> int | None:
        """The longest sequence; ``None`` without a limit."""
        ...

    @property
    def modalities(self) -> tuple[str, ...] | None:
        """Modalities of the base; ``None`` if any name is allowed."""
        ...

    @property
    def takes_soft_prompts(self) -> bool:
        """Whether soft prompts can be prepended."""
        ...

    @property
    def cache(self) -> Cache | None:
        """Shape of the KV cache; ``None`` without one."""
        ...

    @property
    def no_kv_prefix(self) -> str:
        """Why no KV prefix can stand before its rows; empty if one can."""
        ...

    @property
    def has_hidden_states(self) -> bool:
        """Whether it gives hidden states, on which heads act."""
        ...


def check_adapter(
    adapter: Adapter,
    base: AdapterBase,
    origin: str,
    *,
    holder: str | None = None,
    repair: str = "train it for this base, or use it with its own",
    tokenizer_digest: str = "",
) -> None:
    """Check that an adapter belongs to a base and that the base supports it.

    Args:
        adapter: a checked adapter.
        base: the base.
        origin: the adapter's name in errors.
        holder: the container of the base, for errors, such as ``"deployment ./out"``.
        repair: how to repair an adapter of another base.
        tokenizer_digest: digest of the base's tokenizer; empty if it is unknown, and then it is not compared.

    Raises:
        ContractError: they do not match; the message names both.
    """
    config = adapter.config
    what = base.name if holder is None else f"{base.name} of {holder}"
    if config.base_fingerprint != base.fingerprint:
        raise ContractError(
            f"{origin} belongs to another base: it was trained for {config.base_model_name_or_path} "
            f"({config.base_fingerprint}), {what} has {base.fingerprint}: {repair}"
        )
    if base.modalities is not None and (unknown := [name for name in config.modalities if name not in base.modalities]):
        raise ContractError(
            f"{origin} adapts modality {unknown[0]!r}, {what} was exported for {', '.join(base.modalities)}: export "
            f"the base with --modality {unknown[0]} as well, or use an adapter without it"
        )
    if config.hidden_size != base.hidden_size:
        raise ContractError(
            f"{origin} has hidden_size {config.hidden_size}, {what} has {base.hidden_size}: "
            "its adapter_config.json does not describe this base; train it again"
        )
    if config.head is not None and not base.has_hidden_states:
        raise ContractError(
            f"{origin} has a head, which acts on the hidden states of an encoder, and {what} is a decoder: use it with "
            "the encoder that it was trained on"
        )
    check_tokenizer(adapter, tokenizer_digest, origin, what)
    _check_soft_prompt(adapter, base, origin, what)
    _check_kv_prefix(adapter, base, origin, what)
    _check_table(adapter, base, origin, what)


def check_tokenizer(adapter: Adapter, digest: str, origin: str, what: str) -> None:
    """Check that an adapter was trained with the tokenizer whose digest this is; an unknown one is not compared.

    Args:
        adapter: a checked adapter.
        digest: digest of the base's tokenizer.
        origin: the adapter's name in errors.
        what: the base's name in errors.

    Raises:
        ContractError: it was trained with another tokenizer.
    """
    trained = adapter.config.tokenizer_digest
    if trained and digest and trained != digest:
        raise ContractError(
            f"{origin} was trained with another tokenizer ({trained}) than {what} has ({digest}): the same text would "
            "give it tokens that it has not learned from. Export the base again with that tokenizer, or train the "
            "adapter again; if the two are known to give your texts the same tokens, remove tokenizer_digest from its "
            "adapter_config.json"
        )


def _check_soft_prompt(adapter: Adapter, base: AdapterBase, origin: str, what: str) -> None:
    vectors = adapter.weights.get(SOFT_PROMPT_NAME)
    if vectors is None:
        return
    if not base.takes_soft_prompts:
        raise ContractError(
            f"{origin} has a soft prompt, and positions of {what} follow the grid of an image, before which none "
            "can stand: use an adapter without a soft prompt"
        )
    if base.max_positions is not None and len(vectors) >= base.max_positions:
        raise ContractError(
            f"{origin} has a soft prompt of {len(vectors)} positions, {what} was made for at most "
            f"{base.max_positions}: that leaves none for text; train a shorter one"
        )
    _check_range(vectors, base, f"{origin}: the soft prompt", f"which {what} takes")


def _check_kv_prefix(adapter: Adapter, base: AdapterBase, origin: str, what: str) -> None:
    states = adapter.weights.get(KV_PREFIX_NAME)
    if states is None:
        return
    if base.no_kv_prefix or base.cache is None:
        raise ContractError(f"{origin} has a KV prefix, and none can stand before rows of {what}: {base.no_kv_prefix}")
    cache, tokens = base.cache, states.shape[3]
    expected = (cache.layers, 2, cache.kv_heads, tokens, cache.head_dim)
    if states.shape != expected:
        raise ContractError(
            f"{origin} has a KV prefix of shape {states.shape}, the KV cache of {what} asks for {expected} (layers, 2, "
            "kv_heads, tokens, head_dim): use it with the base that it was made for"
        )
    if base.max_positions is not None and adapter.config.prepended_positions >= base.max_positions:
        raise ContractError(
            f"{origin} puts {adapter.config.prepended_positions} positions before every text, {tokens} of them its KV "
            f"prefix, and {what} was made for at most {base.max_positions}: that leaves none for text; make it shorter"
        )
    _check_range(states, base, f"{origin}: the KV prefix", f"in which {what} keeps its KV cache")


def _check_range(numbers: npt.NDArray[np.float32], base: AdapterBase, holder: str, use: str) -> None:
    """Check that numbers are finite in the base's dtype, of which ``use`` says what it is for."""
    with np.errstate(over="ignore"):
        stored = as_stored(numbers, base.embedding_dtype)
    if not np.isfinite(as_float32(stored)).all():
        raise ContractError(
            f"{holder} holds numbers beyond {base.embedding_dtype}, {use}: "
            "train it again with a lower rate, or use a base of another dtype"
        )


def _check_table(adapter: Adapter, base: AdapterBase, origin: str, what: str) -> None:
    table = adapter.weights.get(TABLE_NAME)
    if table is None:
        return
    if len(table) != base.vocab_size:
        raise ContractError(
            f"{origin} has a table of {len(table)} token ids, {what} has {base.vocab_size}: it was trained for "
            "another vocabulary; train it for this base"
        )
    if base.embedding_dtype == "bfloat16":
        raise ContractError(
            f"{origin} adds to embeddings by token id, in numpy, which cannot add to the bfloat16 embeddings of "
            f"{what}: export the base with --dtype fp32 or fp16"
        )
