"""Tokenizer of a GGUF file: what transformers builds of it, put right where it drops what the file says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import ConfigError
from adalink.training.models.gguf.header import read_header
from adalink.training.models.gguf.pretokenizer import apply_pretokenizer, find_pretokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_LEVEL = "gpt2"


def load_gguf_tokenizer(path: Path, assumed: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a GGUF file.

    Args:
        path: the file.
        assumed: the pre-tokenizer to assume where the file does not say one that is known.

    Raises:
        ConfigError: its pre-tokenizer is unknown, and none is assumed.
        ModelError: it is no GGUF file.
        Exception: whatever transformers raises for a tokenizer that it cannot build.
    """
    from transformers import AutoTokenizer

    metadata = read_header(path).metadata
    kind = None
    options: dict[str, Any] = {}
    if metadata.get("tokenizer.ggml.model") == _BYTE_LEVEL:
        kind = find_pretokenizer(metadata.get("tokenizer.ggml.pre"), path.name, assumed)
        if kind.add_bos and "tokenizer.ggml.add_bos_token" not in metadata:
            options["add_bos_token"] = True
    elif assumed is not None:
        raise ConfigError(
            f"{path.name} has a tokenizer of kind {metadata.get('tokenizer.ggml.model')!r}, which takes no "
            "pre-tokenizer: leave --assume-pretokenizer out"
        )
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False, **options)
    if kind is not None:
        apply_pretokenizer(tokenizer, kind)
    return tokenizer
