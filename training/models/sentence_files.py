"""The sentence-transformers files of a checkpoint: how it makes one vector of a text.

They are read as sentence-transformers 6 reads them. Nothing is guessed: a checkpoint without ``modules.json`` says
nothing, and a module that the runtime does not have is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from adalink.runtime.errors import ModelError
from adalink.runtime.storage.decoding import decode_json
from adalink.runtime.storage.pooling_schema import POOLING_MODES, Pooling
from adalink.training.models.hub_access import download_options
from adalink.training.models.source import display_name, find_source

T = TypeVar("T")

MODULES_FILE = "modules.json"
_SETTINGS_FILE = "config_sentence_transformers.json"
_TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_VECTOR, _STATES = "sentence_embedding", "last_hidden_state"
# Prompts that every model has, if only as empty ones.
_EMPTY_PROMPTS = ("query", "document")
_LOADING = {"trust_remote_code", "torch_dtype", "dtype", "attn_implementation", "add_pooling_layer"}
# Arguments of loaders that change no vector, or that are read here.
_HARMLESS = {
    "model_args": _LOADING,
    "model_kwargs": _LOADING,
    "config_args": {"trust_remote_code"},
    "config_kwargs": {"trust_remote_code"},
    "tokenizer_args": {"trust_remote_code", "model_max_length"},
    "processor_kwargs": {"trust_remote_code", "model_max_length"},
}
# What tokenizers without a limit have as one.
_NO_LIMIT = 1 << 40


class _Module(msgspec.Struct):
    """An entry of ``modules.json``."""

    type: str
    path: str = ""

    @property
    def kind(self) -> str:
        """The class without its package, which releases move; the whole name of a class of others."""
        return self.type.rpartition(".")[2] if self.type.startswith("sentence_transformers.") else self.type


class _Transformer(msgspec.Struct):
    """Settings of the first module."""

    max_seq_length: int | None = None
    do_lower_case: bool | None = None
    transformer_task: str = "feature-extraction"
    modality_config: dict[str, dict[str, Any]] | None = None
    module_output_name: str = "token_embeddings"
    model_args: dict[str, Any] | None = None
    model_kwargs: dict[str, Any] | None = None
    config_args: dict[str, Any] | None = None
    config_kwargs: dict[str, Any] | None = None
    tokenizer_args: dict[str, Any] | None = None
    processor_kwargs: dict[str, Any] | None = None


class _PoolingModule(msgspec.Struct):
    """Settings of a pooling module; flags are those of releases before 5.0, in their order of concatenation."""

    pooling_mode_cls_token: bool | None = None
    pooling_mode_max_tokens: bool | None = None
    pooling_mode_mean_tokens: bool | None = None
    pooling_mode_mean_sqrt_len_tokens: bool | None = None
    pooling_mode_weightedmean_tokens: bool | None = None
    pooling_mode_lasttoken: bool | None = None
    pooling_mode: str | list[str] | None = None
    include_prompt: bool = True
    embedding_dimension: int | None = None
    word_embedding_dimension: int | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes; the mean where none is named, as in sentence-transformers."""
        if self.pooling_mode is not None:
            return (self.pooling_mode,) if isinstance(self.pooling_mode, str) else tuple(self.pooling_mode)
        flags = self.__struct_fields__[: len(POOLING_MODES)]
        return tuple(mode for flag, mode in zip(flags, POOLING_MODES, strict=True) if getattr(self, flag)) or ("mean",)


class _Settings(msgspec.Struct):
    """Settings of the whole model."""

    prompts: dict[str, str | None] | None = None
    default_prompt_name: str | None = None


def read_pooling(spec: str | Path, tokenizer: Any, config: Any) -> Pooling | None:
    """How a checkpoint pools; ``None`` if it has no ``modules.json``.

    Args:
        spec: a Hugging Face folder, a GGUF file or a hub id.
        tokenizer: its tokenizer, for the limit of a text's length; ``None`` if it has none.
        config: its transformers configuration.

    Raises:
        ModelError: a file is no JSON of its form, or a setting has no such value.
    """
    files = _SentenceFiles(spec)
    modules = files.read(MODULES_FILE, list[_Module])
    if modules is None:
        return None
    transformer = next((read for name in _TRANSFORMER_FILES if (read := files.read(name, _Transformer))), None)
    transformer = transformer or _Transformer()
    modes: tuple[str, ...] = ()
    include_prompt, normalize = True, False
    reason = _unsupported_input(modules, transformer)
    for number, module in enumerate(modules[1:], 1):
        path = files.inside(module.path, "config.json")
        if module.kind == "Pooling" and not modes:
            pooling = files.read(path, _PoolingModule)
            if pooling is None:
                reason = reason or f"{path} is missing"
                continue
            modes, include_prompt = _check_modes(pooling, config, files.name), pooling.include_prompt
        elif module.kind == "Normalize" and modes:
            normalize = (files.read(path, dict[str, Any], is_default=True) or {}).get(
                "module_input_name", _VECTOR
            ) == _VECTOR
            reason = reason or ("" if normalize else f"module {number} of {MODULES_FILE} normalizes something else")
        elif module.kind != "Dropout":  # which does nothing but in training
            reason = reason or f"module {number} of {MODULES_FILE} is {module.type}"
    settings = files.read(_SETTINGS_FILE, _Settings) or _Settings()
    if files.out_of_reach:
        reason = reason or f"{files.out_of_reach[0]} cannot be fetched now"
    if reason or not modes:
        return Pooling(unsupported=reason or f"{MODULES_FILE} has no Pooling")
    prompts = {name: text or "" for name, text in (settings.prompts or {}).items()}
    default = settings.default_prompt_name
    if default in _EMPTY_PROMPTS:
        prompts.setdefault(default, "")
    if default is not None and default not in prompts:
        raise ModelError(f"base model {files.name}: {_SETTINGS_FILE} has no prompt {default!r}, which is its default")
    return Pooling(
        modes=modes,
        normalize=normalize,
        include_prompt=include_prompt,
        max_tokens=_max_tokens(transformer, tokenizer, config),
        truncate_left=getattr(tokenizer, "truncation_side", "right") == "left",
        lower_case=bool(transformer.do_lower_case),
        prompts=prompts,
        default_prompt=default,
    )


class _SentenceFiles:
    """JSON files of a checkpoint, local or on a hub.

    Attributes:
        name: display name of the checkpoint.
        out_of_reach: files of a hub id of which nobody knows whether they exist, since the hub cannot be reached.
    """

    def __init__(self, spec: str | Path) -> None:
        self._source, self.name = find_source(spec), display_name(spec)
        self.out_of_reach: list[str] = []

    def inside(self, folder: str, file: str) -> str:
        """Path of a file in a folder of the checkpoint; raises ``ModelError`` for one outside."""
        if folder.startswith("/") or "\\" in folder or ".." in folder.split("/"):
            raise ModelError(f"base model {self.name}: {MODULES_FILE} has the path {folder!r}, expected a folder in it")
        return f"{folder}/{file}" if folder else file

    def read(self, path: str, kind: type[T], *, is_default: bool = False) -> T | None:
        """The content of a file; ``None`` if there is none.

        Args:
            path: the file.
            kind: its form.
            is_default: whether a file that is out of reach says nothing that matters.

        Raises:
            ModelError: it has another form.
        """
        folder = Path(self._source.origin)
        file = folder / path if folder.is_dir() else self._fetch(path, is_default or path == MODULES_FILE)
        if file is None or not file.is_file():
            return None
        try:
            return decode_json(file.read_bytes(), kind)
        except (OSError, msgspec.DecodeError) as error:
            raise ModelError(f"base model {self.name}: {path} cannot be read: {error}; correct or remove it") from error

    def _fetch(self, path: str, is_default: bool) -> Path | None:
        """A file of a hub id, from the cache or the network."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self._source.origin, path, **download_options(self._source.origin)))
        except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
            is_known = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if not is_known and not is_default:
                self.out_of_reach.append(path)
            return None


def _unsupported_input(modules: list[_Module], transformer: _Transformer) -> str:
    """What the first module asks for that the runtime does not do, in words; empty if nothing."""
    first = modules[0] if modules else _Module("nothing")
    if first.kind != "Transformer" or first.path not in ("", "."):
        return f"module 0 of {MODULES_FILE} is {first.type} in {first.path!r}"
    if transformer.transformer_task != "feature-extraction":
        return f"its transformer_task is {transformer.transformer_task}"
    forms = transformer.modality_config or {"text": {}}
    if set(forms) != {"text"}:  # texts go into the chat template where there is "message"
        return f"its modality_config takes {', '.join(forms)} rather than text alone"
    output = forms["text"].get("method_output_name", _STATES)
    if output != _STATES or transformer.module_output_name != "token_embeddings":
        return f"it pools {output} as {transformer.module_output_name}"
    for name, harmless in _HARMLESS.items():
        if extra := sorted(set(getattr(transformer, name) or {}) - harmless):
            return f"its {name} have {', '.join(extra)}"
    return ""


def _check_modes(pooling: _PoolingModule, config: Any, name: str) -> tuple[str, ...]:
    """The modes of a pooling module; raises ``ModelError`` if there is no such one, or for another width."""
    modes = pooling.modes
    if not modes or not set(modes) <= set(POOLING_MODES) or len(set(modes)) < len(modes):
        raise ModelError(f"base model {name}: the pooling mode is {modes}, expected some of {', '.join(POOLING_MODES)}")
    width = pooling.embedding_dimension or pooling.word_embedding_dimension
    expected = getattr(config, "hidden_size", None)
    if None not in (width, expected) and width != expected:
        raise ModelError(f"base model {name}: its pooling is for {width} numbers, the model's states have {expected}")
    return modes


def _max_tokens(transformer: _Transformer, tokenizer: Any, config: Any) -> int | None:
    """Tokens to which texts are cut: the files' own, else the least of the tokenizer's and the model's."""
    arguments = {**(transformer.tokenizer_args or {}), **(transformer.processor_kwargs or {})}
    limit = arguments.get("model_max_length", transformer.max_seq_length)
    if limit is None:
        positions = getattr(config, "max_position_embeddings", -1)
        limits = [getattr(tokenizer, "model_max_length", None), None if positions == -1 else positions]
        limit = min((value for value in limits if value is not None), default=None)
    return int(limit) if isinstance(limit, (int, float)) and 1 <= limit < _NO_LIMIT else None
