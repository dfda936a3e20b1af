"""A tiny encoder with sentence-transformers files, written by sentence-transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_pair_tokenizer

TEXTS = ["a", "oil prices rose", "", "Two CAPITAL words, 12 of them", "the quick brown fox jumps over the dog " * 3]


def save_encoder(folder: Path, tokenizer: Any = None) -> Path:
    """A tiny BERT without sentence-transformers files."""
    FAMILIES["bert"]().save_pretrained(folder)
    (tokenizer or make_pair_tokenizer()).save_pretrained(folder)
    return folder


def save_sentence_encoder(
    folder: Path, encoder: Path, pooling: dict[str, Any], *, normalize: bool = False, **settings: Any
) -> Path:
    """The encoder in ``encoder`` with modules behind it; ``settings`` are those of a ``SentenceTransformer``.

    ``max_seq_length`` and ``do_lower_case`` go to its first module, as in files of older releases.
    """
    import json

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    first = {name: settings.pop(name) for name in ("max_seq_length", "do_lower_case") if name in settings}
    modules = [Transformer(str(encoder)), Pooling(48, **pooling), *([Normalize()] if normalize else [])]
    SentenceTransformer(modules=modules, device="cpu", **settings).save(str(folder), create_model_card=False)
    path = folder / "sentence_bert_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **first}))
    return folder


def sentence_embeddings(folder: Path, texts: list[str], **arguments: Any) -> Any:
    """What sentence-transformers computes, float32 of shape ``(texts, width)``."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False, **arguments)
