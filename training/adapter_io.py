"""Adapter folders: save and load. A folder is replaced atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from adalink.runtime.errors import AdapterError
from adalink.runtime.storage.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    AdapterConfig,
    encode_adapter,
    make_adapter,
    read_adapter,
)
from adalink.runtime.storage.adapter_spec import MethodSpec, settings_of
from adalink.runtime.storage.atomic import write_through
from adalink.runtime.storage.atomic_folder import replace_folder
from adalink.runtime.storage.contract import check_adapter
from adalink.runtime.storage.tokenizer_digest import tokenizer_digest
from adalink.training.method.attach import AdaLinkModel, attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import base_fingerprint, embedding_matrix, max_positions
from adalink.training.models.source import display_name
from adalink.training.run_folder import check_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def to_adapter(attached: AdaLinkModel, base_name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Adapter:
    """The attached weights as a checked adapter for this base.

    Args:
        attached: a model with adapters.
        base_name: display name of the base (``adalink.training.models.loading.display_name``).
        tokenizer: the tokenizer of the training, whose digest the adapter keeps.

    Raises:
        AdapterError: a weight is NaN or infinite.
    """
    config = AdapterConfig(
        base_model_name_or_path=base_name,
        base_fingerprint=base_fingerprint(attached.model),
        hidden_size=attached.hidden_size,
        tokenizer_digest=digest_tokenizer(tokenizer),
        **settings_of(attached.config, MethodSpec),
    )
    return make_adapter(config, attached.weights(), origin=f"adapter for {base_name}")


def digest_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Digest of a fast tokenizer, as the deployment's has it; empty for another or none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "" if backend is None else tokenizer_digest(backend.to_str())


def save_adapter(folder: str | Path, adapter: Adapter | AdaLinkModel, extra: Mapping[str, bytes] | None = None) -> None:
    """Write an adapter folder, or replace one, atomically.

    Args:
        folder: the adapter folder.
        adapter: an attached model, or the adapter that ``to_adapter`` made of one, with another name of its base.
        extra: additional files by name.

    Raises:
        AdapterError: the folder holds something other than an adapter.
        WriteError: the disk is full or read-only; the old folder is unchanged.
    """
    if isinstance(adapter, AdaLinkModel):
        adapter = to_adapter(adapter, display_name(adapter.model.config.name_or_path))
    folder = Path(folder).resolve()  # "x/.." has no name of its own, and nothing beside it
    check_target(folder)
    config_bytes, weights_bytes = encode_adapter(adapter)
    files = {CONFIG_FILE: config_bytes, WEIGHTS_FILE: weights_bytes, **(extra or {})}
    with replace_folder(folder, f"adapter {folder}") as staging:
        for name, data in files.items():
            write_through(staging / name, data)


def load_adapter(folder: str | Path, model: PreTrainedModel) -> AdaLinkModel:
    """Read an adapter folder and attach it to the base it was trained for.

    Raises:
        AdapterError: the folder is missing, truncated or numerically broken, or holds a table of token ids.
        ContractError: it was trained for another base.
        ModelError: an adapter is attached already.
    """
    adapter = read_adapter(folder)
    config = adapter.config
    check_adapter(adapter, _ModelBase(model), f"adapter {folder}", repair="load that base in float32")
    if config.input == "ids":
        raise AdapterError(
            f"adapter {folder} has a table of token ids, expected one that acts on embeddings: what trained it loads it"
        )
    # In PyTorch weights are float32, and training would undo an order of the dimensions.
    settings = {**settings_of(config, MethodSpec), "weight_dtype": "float32", "nested": False}
    attached = attach(model, AdaLinkConfig(**settings))
    attached.load_weights(adapter.weights)
    attached.adapters.eval()
    return attached


class _ModelBase:
    """The base contract of a model for ``check_adapter``; ``attach`` checks what its class can take."""

    embedding_dtype = "float32"
    modalities = None
    takes_soft_prompts = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.name = f"this {type(model).__name__}"
        self.has_hidden_states = not model.can_generate() or bool(model.config.is_encoder_decoder)
        self.fingerprint = base_fingerprint(model)
        self.vocab_size, self.hidden_size = embedding_matrix(model).shape
        self.max_positions = max_positions(model)
