"""What kind of model a checkpoint is, by its config alone: known before PyTorch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from adalink.runtime.storage.decoding import decode_json
from adalink.training.models.gguf.header import read_header
from adalink.training.models.source import Source
from adalink.training.models.weight_files import fetch_file

_DECODER_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Encoders among the architectures of GGUF files.
_GGUF_ENCODERS = ("bert", "nomic-bert", "jina-bert-v2", "modern-bert", "eurobert")


def read_config(source: Source) -> dict[str, Any] | None:
    """``config.json`` of a folder or hub id; ``None`` for another base, or one whose loading will say what is wrong."""
    if source.gguf_file is not None:
        return None
    folder = Path(source.origin)
    path = folder / "config.json" if folder.is_dir() else fetch_file(source.origin, "config.json")
    if path is None or not path.is_file():
        return None
    try:
        return decode_json(path.read_bytes(), dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return None


def find_kind(source: Source) -> str | None:
    """``"encoder"``, ``"decoder"`` or ``"encoder-decoder"``, as ``load_checkpoint`` will load it.

    ``None`` where only loading tells, as where the config names no class.

    Raises:
        ModelError: a GGUF file is damaged.
    """
    if source.gguf_path is not None:
        architecture = read_header(source.gguf_path).architecture
        if architecture in _GGUF_ENCODERS:
            return "encoder"
        return "encoder-decoder" if architecture == "t5" else "decoder"
    config = read_config(source) or {}
    names = config.get("architectures")
    if config.get("is_encoder_decoder") is True:
        return "encoder-decoder"
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        return None
    return "decoder" if names[0].endswith(_DECODER_CLASSES) else "encoder"


def auto_class(config: Any) -> Any:
    """The transformers auto class for a checkpoint; GGUF configs carry no ``architectures``."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if names := config.architectures:
        if names[0].endswith("ForConditionalGeneration"):
            return AutoModelForImageTextToText
        return AutoModelForCausalLM if names[0].endswith(("ForCausalLM", "LMHeadModel")) else AutoModel
    is_decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    return AutoModelForCausalLM if is_decoder else AutoModel
