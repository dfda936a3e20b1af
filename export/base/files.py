"""Files shared by all variants of a base: contract, embedding table, tokenizer, chat template and bank graphs."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import msgspec

from adalink.export.adapter.bank_graph import build_bank_graph
from adalink.export.architectures import Architecture, cache_shape
from adalink.export.base.generation import describe_generation
from adalink.export.writer import DeploymentWriter
from adalink.runtime.errors import ContractError, IntegrityError, ModelError, RequestError
from adalink.runtime.storage.adapter_spec import ACTIVATION_KEYS
from adalink.runtime.storage.integrity import read_verified
from adalink.runtime.storage.manifest import Base, Manifest, Vision
from adalink.runtime.storage.tokenizer_digest import tokenizer_digest
from adalink.runtime.text.fast_tokenizer import tokenizer_errors
from adalink.runtime.vision.preprocess import read_preprocessor
from adalink.training.models.loading import max_positions

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from adalink.runtime.vision.preprocess import Preprocessor

EMBEDDINGS_FILE = "base/embeddings.safetensors"
TOKENIZER_FILE = "base/tokenizer.json"
CHAT_TEMPLATE_FILE = "base/chat_template.jinja"
BANK_FOLDER = "base/bank"


def describe_base(
    model: PreTrainedModel,
    architecture: Architecture,
    name: str,
    digests: tuple[str, str],
    dtype: str,
    modalities: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase | None,
    vision: Vision | None,
) -> Base:
    """The base contract.

    Args:
        model: the exported model; of one that takes images, its language model.
        architecture: its entry in the registry.
        name: display name.
        digests: fingerprint of the float32 model, and digest of all its weights.
        dtype: dtype of the embeddings.
        modalities: input modalities.
        tokenizer: its tokenizer, if it has one.
        vision: its vision encoder, if it takes images.
    """
    config = model.config
    rows, width = model.get_input_embeddings().weight.shape
    eos = _end_tokens(model, tokenizer, rows)
    pad = _token_ids(model, "pad_token_id", rows) or eos or (0,)
    bos = _token_ids(model, "bos_token_id", rows)
    start = _token_ids(model, "decoder_start_token_id", rows) or bos
    if architecture.kind == "encoder-decoder" and not start:
        raise ModelError(
            f"the configuration of {name} says neither decoder_start_token_id nor bos_token_id, with one of which its "
            "decoder begins: set it in config.json"
        )
    return Base(
        name=name,
        architecture=config.model_type,
        kind=architecture.kind,
        fingerprint=digests[0],
        vocab_size=rows,
        hidden_size=width,
        embedding_dtype=dtype,
        modalities=modalities,
        max_positions=max_positions(model),
        cache=cache_shape(config, architecture),
        eos_token_ids=eos,
        pad_token_id=pad[0],
        bos_token_id=bos[0] if bos else None,
        decoder_start_token_id=start[0] if start and architecture.kind == "encoder-decoder" else None,
        embeddings=EMBEDDINGS_FILE,
        tokenizer=None if tokenizer is None else TOKENIZER_FILE,
        chat_template=CHAT_TEMPLATE_FILE if _check_chat_template(tokenizer) else None,
        bank={key: f"{BANK_FOLDER}/{key}.onnx" for key in ACTIVATION_KEYS},
        vision=vision,
        bidirectional_prompt=architecture.bidirectional_prompt,
        weights_digest=digests[1],
        tokenizer_digest="" if tokenizer is None else tokenizer_digest(_tokenizer_text(tokenizer)),
        generation=describe_generation(model, architecture.kind, rows),
        token_types=_token_types(model, architecture),
        tokenizer_types="token_type_ids" in getattr(tokenizer, "model_input_names", ()),
        special_tokens=special_tokens(tokenizer),
    )


def _token_ids(model: PreTrainedModel, name: str, rows: int) -> tuple[int, ...]:
    """Ids of a special token, from the generation config, else the config; those outside the vocabulary are dropped."""
    for config in (getattr(model, "generation_config", None), model.config):
        value = getattr(config, name, None)
        ids = [value] if isinstance(value, int) else list(value or [])
        if ids := [token for token in ids if 0 <= token < rows]:
            return tuple(dict.fromkeys(ids))
    return ()


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, rows: int) -> tuple[int, ...]:
    """End tokens: the model's, then the tokenizer's, which ends completions in training."""
    of_model, of_tokenizer = _token_ids(model, "eos_token_id", rows), getattr(tokenizer, "eos_token_id", None)
    if not isinstance(of_tokenizer, int) or not 0 <= of_tokenizer < rows:
        return of_model
    return tuple(dict.fromkeys((*of_model, of_tokenizer)))


def _token_types(model: PreTrainedModel, architecture: Architecture) -> int:
    """Token types that a model tells apart; 1 for all kinds but encoders."""
    return int(getattr(model.config, "type_vocab_size", None) or 1) if architecture.kind == "encoder" else 1


def _chat_template(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """The tokenizer's chat template; of several, ``default``, and ``tool_use`` where there are tools."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, dict):
        return template
    default, with_tools = template.get("default"), template.get("tool_use")
    if with_tools is None:
        return default
    if default is None:
        default = "{{ raise_exception('this model has a chat template for tools alone') }}"
    # Jinja drops a template's last line end, and line ends and spaces beside a tag: an empty text keeps those inside.
    parts = [f"{{{{ '' }}}}{part.removesuffix(chr(10))}{{{{ '' }}}}" for part in (with_tools, default)]
    return f"{{% if tools is not none %}}{parts[0]}{{% else %}}{parts[1]}{{% endif %}}"


def special_tokens(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, str | tuple[str, ...]] | None:
    """Special tokens by name, those that transformers gives to chat templates; ``None`` without a tokenizer."""
    if tokenizer is None:
        return None
    return {
        str(name): tuple(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        for name, value in tokenizer.special_tokens_map.items()
    }


def _check_chat_template(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """The chat template, compiled once to see that it can be; raises ``ModelError``."""
    from adalink.runtime.text.chat_template import ChatTemplate

    template = _chat_template(tokenizer)
    if not template:
        return None
    if not isinstance(template, str):
        raise ModelError(f"the chat template of the tokenizer is a {type(template).__name__}, expected a text")
    try:
        ChatTemplate(template, "the chat template of the tokenizer", {})
    except RequestError as error:
        raise ModelError(f"{error}; or correct chat_template.jinja, or remove it, and export again") from error
    return template


def write_common(writer: DeploymentWriter, base: Base, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write the shared files beside the embedding table: tokenizer, chat template, bank graphs.

    Raises:
        ModelError: the tokenizer has no ``tokenizer.json``.
        OSError: the disk is full or read-only.
    """
    if tokenizer is not None:
        writer.stage(TOKENIZER_FILE).write_text(_tokenizer_text(tokenizer), encoding="utf-8")
    if template := _chat_template(tokenizer):
        writer.stage(CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
    for activation_key, relative in base.bank.items():
        graph = build_bank_graph(activation_key, base.hidden_size, base.embedding_dtype)
        writer.stage(relative).write_bytes(graph.SerializeToString(deterministic=True))


def check_common(
    folder: Path,
    manifest: Manifest,
    new: Base,
    tokenizer: PreTrainedTokenizerBase | None,
    preprocessor: Preprocessor | None,
) -> None:
    """Refuse a model whose tokenizer, templates, special tokens, generation config, pooling or image processor differ.

    A model without a tokenizer is not compared: the deployment's tokenizer stays.

    Args:
        folder: the deployment.
        manifest: its manifest.
        new: the base contract of the model.
        tokenizer: its tokenizer.
        preprocessor: its image preprocessing; ``None`` if it takes no images, and then neither does the deployment.

    Raises:
        ContractError: one of them differs.
        IntegrityError: a file of the deployment is missing or altered.
    """

    def read(path: str | None) -> str | None:
        return None if path is None else read_verified(folder, manifest, path).decode()

    current = manifest.base
    same = {name: getattr(current, name) == getattr(new, name) for name in ("bos_token_id", "decoder_start_token_id")}
    # Older kits recorded none; the base stays as it is.
    same["generation_config"] = current.generation is None or current.generation == new.generation
    # Files that say nothing leave the base as it is.
    same["pooling"] = None in (current.pooling, new.pooling) or current.pooling == new.pooling
    if tokenizer is None:
        ends = current.eos_token_ids if current.tokenizer is None else current.eos_token_ids[: len(new.eos_token_ids)]
        same["eos_token_ids"] = ends == new.eos_token_ids
    else:
        same["eos_token_ids"] = current.eos_token_ids == new.eos_token_ids
        same["tokenizer"] = _is_same_tokenizer(read(current.tokenizer), tokenizer)
        if current.special_tokens is not None:  # older kits did not store them
            same["special_tokens"] = current.special_tokens == new.special_tokens
        same["chat_template"] = read(current.chat_template) == (_chat_template(tokenizer) or None)
    if current.vision is not None:
        path = current.vision.preprocessor
        same["image processor"] = read_preprocessor(read_verified(folder, manifest, path), path) == preprocessor
    if changed := [name for name, is_same in same.items() if not is_same]:
        raise ContractError(
            f"deployment {folder} holds base {current.name!r} with another {' and '.join(changed)} than {new.name!r} "
            "has now: variants share them, and they stay as they were written; export into another folder"
        )


def _is_same_tokenizer(stored: str | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a stored tokenizer is this one, whatever release of ``tokenizers`` wrote it."""
    from tokenizers import Tokenizer

    if stored is None:
        return False
    with tokenizer_errors(IntegrityError, f"{TOKENIZER_FILE} is not a tokenizer.json; export the base anew"):
        read = Tokenizer.from_str(stored).to_str()
    return _plain_tokenizer(read) == _tokenizer_text(tokenizer)


def _tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Content of ``tokenizer.json``; raises ``ModelError`` if the tokenizer has no such form."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(tokenizer).__name__} cannot be written as tokenizer.json; expected a fast tokenizer")
    with tokenizer_errors(ModelError, f"{type(tokenizer).__name__} cannot be written as tokenizer.json"):
        return _plain_tokenizer(backend.to_str())


def _plain_tokenizer(text: str) -> str:
    """``tokenizer.json`` without padding and truncation settings; the runtime does both itself."""
    content = msgspec.json.decode(text)
    content["padding"] = content["truncation"] = None
    return msgspec.json.encode(content).decode()


def metadata_of(base: Base) -> dict[str, str]:
    """Metadata properties of every graph of a base."""
    return {
        "base_fingerprint": base.fingerprint,
        "architecture": base.architecture,
        "kit_version": version("adalink-kit"),
    }
