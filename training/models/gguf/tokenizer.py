"""Tokenizer of a GGUF file: what transformers builds of it, put right where it drops what the file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import ConfigError, ModelError
from adalink.training.models.gguf.header import read_header
from adalink.training.models.gguf.pretokenizer import apply_pretokenizer, find_pretokenizer
from adalink.training.models.gguf.unigram import CHARSMAP, UNIGRAM, UNIGRAM_KEYS, repair_unigram

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
_TOKENS, _KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_CONTROL, _USER_DEFINED = 3, 4
# Keys below `tokenizer.` that are used, by transformers, here or for the model's end tokens.
_USED = (
    *("ggml.model", "ggml.pre", "ggml.tokens", "ggml.scores", "ggml.token_type", "ggml.merges", "chat_template"),
    *(f"ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding")),
    *("ggml.add_bos_token", "ggml.add_eos_token", "ggml.add_space_prefix"),
)
# Keys of what the kit has no use for: filling in the middle, masks, segments, further chat templates.
_UNUSED = (
    *(f"ggml.{name}_token_id" for name in ("seperator", "separator", "mask", "cls", "prefix", "suffix", "middle")),
    *(f"ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    *("ggml.token_type_count", "chat_templates"),
)
# Keys that change tokens unless they have this value.
_NEUTRAL = {"ggml.remove_extra_whitespaces": False, "ggml.add_sep_token": False}


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

    metadata = read_header(path, arrays=(_TOKENS, _KINDS, f"tokenizer.{CHARSMAP}")).metadata
    _check_keys(path.name, metadata)
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
    elif metadata.get("tokenizer.ggml.model") == UNIGRAM:
        repair_unigram(path.name, metadata, tokenizer)
    elif metadata.get("tokenizer.ggml.model") == _SENTENCEPIECE:
        if metadata.get("tokenizer.ggml.add_space_prefix") is False:
            _drop_space_prefix(path.name, tokenizer)
        _add_ends(metadata, tokenizer)
    _repair_vocabulary(metadata, tokenizer)
    _check_vocabulary(path.name, metadata, tokenizer)
    return tokenizer


def _check_keys(file: str, metadata: dict[str, Any]) -> None:
    """Refuse a key of the tokenizer that would be dropped; raises ``ModelError``."""
    used = (*_USED, *(UNIGRAM_KEYS if metadata.get("tokenizer.ggml.model") == UNIGRAM else ()))
    for full, value in metadata.items():
        key = full.removeprefix("tokenizer.")
        if key == full or key in used or key in _UNUSED or key.startswith("chat_template."):
            continue
        if key not in _NEUTRAL or value != _NEUTRAL[key]:
            raise ModelError(
                f"base model {file}: its metadata key {full} would be dropped, and texts get other tokens than it "
                "says; expected keys that are known: export the original checkpoint instead, or convert it again"
            )


def _add_ends(metadata: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Begin and end texts as the file says, by llama.cpp's defaults; transformers before 5.23 drops both flags."""
    from tokenizers.processors import TemplateProcessing

    flags = {"bos": ("add_bos_token", True), "eos": ("add_eos_token", False)}
    added = {
        name: metadata[f"tokenizer.ggml.{name}_token_id"]
        for name, (flag, default) in flags.items()
        if metadata.get(f"tokenizer.ggml.{flag}", default) and f"tokenizer.ggml.{name}_token_id" in metadata
    }
    backend = tokenizer.backend_tokenizer
    inner = backend.encode("a", add_special_tokens=False).ids
    bos, eos = ([added[name]] if name in added else [] for name in ("bos", "eos"))
    if backend.encode("a").ids == [*bos, *inner, *eos]:
        return
    spelled = {index: metadata[_TOKENS][index] for index in (*bos, *eos)}
    single = [*(spelled[index] for index in bos), "$A", *(spelled[index] for index in eos)]
    backend.post_processor = TemplateProcessing(
        single=single,
        pair=[*single, *(part.replace("$A", "$B:1") for part in single)],
        special_tokens=[(token, index) for index, token in spelled.items()],
    )


def _drop_space_prefix(file: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Begin texts without the space that SentencePiece adds by default; raises ``ModelError``."""
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    content = json.loads(backend.to_str())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        content[part] = _without_prefix(content[part])
    changed = Tokenizer.from_str(json.dumps(content))
    backend.normalizer, backend.pre_tokenizer = changed.normalizer, changed.pre_tokenizer
    backend.decoder = changed.decoder
    if backend.encode("a", add_special_tokens=False).tokens[0].startswith("\u2581"):
        raise ModelError(
            f"base model {file}: its metadata key tokenizer.ggml.add_space_prefix is false, and transformers adds a "
            "space: export the original checkpoint instead"
        )


def _without_prefix(part: Any) -> Any:
    """A part of ``tokenizer.json`` that neither adds nor strips a leading space."""
    if not isinstance(part, dict):
        return part
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    for name in ("normalizers", "pretokenizers", "decoders"):
        if name in part:
            kept = [_without_prefix(step) for step in part[name] if step["type"] not in ("Prepend", "Strip")]
            return part | {name: kept}
    return part


def _repair_vocabulary(metadata: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the file's tokens and no others, in place.

    transformers adds tokens that its classes expect, beyond the vocabulary, and spells special tokens of other letters
    than the byte alphabet's anew, so that none is found whole in a text.
    """
    from tokenizers import Tokenizer

    tokens, special = metadata[_TOKENS], _special(metadata)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"].get("vocab")
    added = [token for token in content["added_tokens"] if token["id"] < len(tokens)]
    if isinstance(vocabulary, dict):
        spelled = {index: token for token, index in vocabulary.items()}
        for index in special:
            if (old := spelled.get(index)) != tokens[index]:
                vocabulary.pop(old, None)
                vocabulary[tokens[index]] = index
                added.append(_added(index, tokens[index], is_special=special[index] == _CONTROL))
    if added == content["added_tokens"]:
        return
    content["added_tokens"] = sorted(added, key=lambda token: token["id"])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))


def _special(metadata: dict[str, Any]) -> dict[int, int]:
    """Kind of each token that texts hold whole, by its id."""
    kinds = metadata.get(_KINDS) or ()
    return {index: kind for index, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)}


def _added(index: int, token: str, *, is_special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": token, **flags, "special": is_special}


def _check_vocabulary(file: str, metadata: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that tokens have the ids of the file, and that special ones are found whole; raises ``ModelError``."""
    tokens = metadata[_TOKENS]
    if len(tokenizer) != len(tokens):
        raise ModelError(
            f"base model {file}: its vocabulary has {len(tokens)} tokens, and transformers makes {len(tokenizer)} of "
            "them: export the original checkpoint instead"
        )
    for index in _special(metadata):
        ids = tokenizer.backend_tokenizer.encode(tokens[index], add_special_tokens=False).ids
        if ids != [index]:
            raise ModelError(
                f"base model {file}: its special token {tokens[index]!r} is {index}, and a text gives it {ids}: "
                "export the original checkpoint instead"
            )
