"""What a LoRA needs to know of its base: from a deployment, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from adalink.export.architectures import ARCHITECTURES, architecture_of, embedding_scale
from adalink.runtime.storage.contract import AdapterBase
from adalink.runtime.storage.embedding_table import open_table
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest import Cache
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.safetensors import as_float32
from adalink.runtime.storage.tokenizer_digest import deployed_tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EMBEDDINGS = {"gpt2": "transformer.wte"}
_DECODER_EMBEDDING, _ENCODER_EMBEDDING = "model.embed_tokens", "embeddings.word_embeddings"


@dataclass(frozen=True)
class LoraBase:
    """A base, as far as a LoRA of it is concerned.

    Attributes:
        contract: what an adapter must match.
        name: display name; of a hub id, the id.
        model_type: Hugging Face ``model_type``; for a vision model, its language model's.
        embedding: path of the input embedding in the model, such as ``"model.embed_tokens"``; ``None`` if unknown.
        is_tied: whether the head is the embedding matrix; ``None`` if unknown.
        gguf: the GGUF file that the base is; ``None`` for another kind.
        tokenizer_digest: digest of its tokenizer; empty if unknown.
        scale: the factor by which its embedding module multiplies rows of its matrix; 1 for most models.
        rows: embeddings of consecutive tokens, from a range of ids: float32 with shape ``(tokens, d)``, as the model's
            module returns them.
    """

    contract: AdapterBase
    name: str
    model_type: str
    embedding: str | None
    is_tied: bool | None
    gguf: Path | None
    tokenizer_digest: str
    scale: float
    rows: Callable[[int, int], npt.NDArray[np.float32]]

    @property
    def kind(self) -> str:
        """One of ``adalink.runtime.storage.manifest.BASE_KINDS``."""
        return ARCHITECTURES[self.model_type].kind


@dataclass(frozen=True)
class _Checkpoint:
    """The contract of a checkpoint."""

    name: str
    fingerprint: str
    vocab_size: int
    hidden_size: int
    has_hidden_states: bool
    embedding_dtype: str = "float32"
    max_positions: int | None = None
    modalities: tuple[str, ...] | None = None
    takes_soft_prompts: bool = True
    cache: Cache | None = None
    no_kv_prefix: str = "a LoRA has none"


def base_of_deployment(folder: Path) -> LoraBase:
    """The base of a deployment, with the embeddings that its tasks act on.

    Raises:
        DeploymentError: there is no deployment, or its embedding table was altered.
    """
    manifest = read_manifest(folder)
    base = manifest.base
    verified = verify_files(folder, manifest, [base.embeddings])
    table = open_table(folder / base.embeddings, base)
    verified.check_unchanged()
    embedding = _ENCODER_EMBEDDING if base.kind == "encoder" else _DECODER_EMBEDDING
    return LoraBase(
        contract=base,
        name=base.name,
        model_type=base.architecture,
        embedding=_EMBEDDINGS.get(base.architecture, embedding) if base.vision is None else None,
        is_tied=None,
        gguf=None,
        tokenizer_digest=deployed_tokenizer_digest(folder, manifest),
        scale=embedding_scale(base.architecture, base.hidden_size),
        rows=lambda first, last: as_float32(table.block(first, last)),
    )


def base_of_checkpoint(spec: str) -> LoraBase:
    """The base in a Hugging Face folder, a GGUF file or a hub id; its matrices stay in their files.

    Raises:
        ModelError: there is no such model, or its type is not supported.
    """
    import torch

    from adalink.export.base.table import module_scale
    from adalink.export.vision.tower import language_model
    from adalink.training.models.loading import base_fingerprint, embedding_matrix, open_checkpoint
    from adalink.training.models.source import display_name, gguf_file

    checkpoint, stand_ins = open_checkpoint(spec)
    model = language_model(checkpoint.model)
    kind, model_type = architecture_of(model).kind, model.config.model_type
    matrix = embedding_matrix(model)
    weight, scale = stand_ins.source(matrix), module_scale(model)

    def rows(first: int, last: int) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = weight.read(first, last).to(torch.float32).numpy()
        return values * np.float32(scale)

    vocab_size, hidden_size = matrix.shape
    contract = _Checkpoint(
        name=display_name(spec),
        fingerprint=base_fingerprint(model, stand_ins),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        has_hidden_states=kind != "decoder",
    )
    head = model.get_output_embeddings()
    return LoraBase(
        contract=contract,
        name=contract.name,
        model_type=model_type,
        embedding=_find_embedding(checkpoint.model),
        is_tied=head is not None and head.weight.data_ptr() == matrix.data_ptr(),
        gguf=gguf_file(spec),
        tokenizer_digest="",
        scale=scale,
        rows=rows,
    )


def _find_embedding(model: PreTrainedModel) -> str:
    """Path of the input embedding in a model."""
    from adalink.training.models.loading import input_embedding

    embedding = input_embedding(model)
    name: str = next(name for name, module in model.named_modules() if module is embedding)
    return name
