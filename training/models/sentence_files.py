"""The sentence-transformers files of a checkpoint: how it makes one vector of a text.

They are read as sentence-transformers 6 reads them. Nothing is guessed: a checkpoint without ``modules.json`` says
nothing, and a module that the runtime does not have is named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adalink.runtime.errors import ModelError
from adalink.runtime.storage.pooling_schema import POOLING_MODES, Pooling
from adalink.training.models.source import display_name, find_source
from adalink.training.models.weight_files import fetch_file

MODULES_FILE = "modules.json"
_SETTINGS_FILE = "config_sentence_transformers.json"
_TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_OLD_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
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


def read_pooling(spec: str | Path, tokenizer: Any, config: Any) -> Pooling | None:
    """How a checkpoint pools; ``None`` if it has no ``modules.json``.

    Args:
        spec: a Hugging Face folder, a GGUF file or a hub id.
        tokenizer: its tokenizer, for the limit of a text's length; ``None`` if it has none.
        config: its transformers configuration.

    Raises:
        ModelError: a file is no JSON, or a setting has no such value.
    """
    files = _SentenceFiles(spec)
    modules = files.read(MODULES_FILE)
    if modules is None:
        return None
    kinds = [_kind(module, files.name) for module in modules]
    paths = [str(module.get("path", "")) for module in modules]
    if kinds[:1] != ["Transformer"] or paths[0] not in ("", "."):
        return Pooling(unsupported=f"module 0 of {MODULES_FILE} is {modules[0].get('type')} in {paths[0]!r}")
    transformer: dict[str, Any] = next((found for name in _TRANSFORMER_FILES if (found := files.read(name))), {})
    if reason := _unsupported_input(transformer):
        return Pooling(unsupported=reason)
    modes: tuple[str, ...] = ()
    include_prompt, normalize = True, False
    for number, (kind, path) in enumerate(zip(kinds[1:], paths[1:], strict=True), 1):
        settings = files.read(f"{path}/config.json") or {}
        if kind == "Pooling" and not modes:
            modes, include_prompt = _modes(settings, config, files.name), bool(settings.get("include_prompt", True))
        elif kind == "Normalize" and modes and settings.get("module_input_name", _VECTOR) == _VECTOR:
            normalize = True
        elif kind != "Dropout":  # which does nothing but in training
            return Pooling(unsupported=f"module {number} of {MODULES_FILE} is {modules[number].get('type')}")
    if not modes:
        return Pooling(unsupported=f"{MODULES_FILE} has no Pooling")
    prompts = files.read(_SETTINGS_FILE) or {}
    return Pooling(
        modes=modes,
        normalize=normalize,
        include_prompt=include_prompt,
        max_tokens=_max_tokens(transformer, tokenizer, config),
        truncate_left=getattr(tokenizer, "truncation_side", "right") == "left",
        lower_case=bool(transformer.get("do_lower_case", False)),
        prompts={str(name): str(text or "") for name, text in (prompts.get("prompts") or {}).items()},
        default_prompt=prompts.get("default_prompt_name"),
    )


_VECTOR = "sentence_embedding"


class _SentenceFiles:
    """JSON files of a checkpoint, local or on a hub."""

    def __init__(self, spec: str | Path) -> None:
        self._source, self.name = find_source(spec), display_name(spec)

    def read(self, path: str) -> Any:
        """The content of a file; ``None`` if there is none. Raises ``ModelError``."""
        folder = Path(self._source.origin)
        file: Path | None = folder / path
        if not folder.is_dir():
            file = fetch_file(self._source.origin, path)
        if file is None or not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"base model {self.name}: {path} is no JSON: {error}") from error
        kind = list if path == MODULES_FILE else dict
        if not isinstance(content, kind) or not content or (kind is list and not all(map(_is_dict, content))):
            if content == {}:
                return {}
            raise ModelError(f"base model {self.name}: {path} holds {str(content)[:60]}, expected a {kind.__name__}")
        return content


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _kind(module: dict[str, Any], name: str) -> str:
    """Class of a module of sentence-transformers without its package, which releases move; else its whole name."""
    path = str(module.get("path", ""))
    if path.startswith("/") or "\\" in path or ".." in path.split("/"):
        raise ModelError(
            f"base model {name}: {MODULES_FILE} has the path {path!r}, expected a folder of the checkpoint"
        )
    kind = str(module.get("type"))
    return kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind


def _modes(settings: dict[str, Any], config: Any, name: str) -> tuple[str, ...]:
    """The modes of a pooling module; the mean where it names none, as in sentence-transformers."""
    modes = settings.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _OLD_FLAGS.items() if settings.get(flag)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if not modes or not set(modes) <= set(POOLING_MODES):
        raise ModelError(f"base model {name}: the pooling mode is {modes}, expected some of {', '.join(POOLING_MODES)}")
    width = settings.get("embedding_dimension", settings.get("word_embedding_dimension"))
    expected = getattr(config, "hidden_size", None)
    if width is not None and expected is not None and width != expected:
        raise ModelError(f"base model {name}: its pooling is for {width} numbers, the model's states have {expected}")
    return modes


def _unsupported_input(transformer: dict[str, Any]) -> str:
    """What the settings of the first module ask for that the runtime does not do, in words; empty if nothing."""
    if (task := transformer.get("transformer_task", "feature-extraction")) != "feature-extraction":
        return f"its transformer_task is {task}"
    forms = transformer.get("modality_config", {"text": {}})
    if set(forms) != {"text"}:  # texts go into the chat template where there is "message"
        return f"its modality_config takes {', '.join(forms)} rather than text alone"
    output = forms["text"].get("method_output_name", "last_hidden_state")
    if output != "last_hidden_state" or transformer.get("module_output_name", "token_embeddings") != "token_embeddings":
        return f"it pools {output} as {transformer.get('module_output_name')}"
    for name, harmless in _HARMLESS.items():
        if extra := sorted(set(transformer.get(name) or {}) - harmless):
            return f"its {name} have {', '.join(extra)}"
    return ""


def _max_tokens(transformer: dict[str, Any], tokenizer: Any, config: Any) -> int | None:
    """Tokens to which texts are cut: the files' own, else the least of the tokenizer's and the model's."""
    arguments = (transformer.get("tokenizer_args") or {}) | (transformer.get("processor_kwargs") or {})
    limit = arguments.get("model_max_length", transformer.get("max_seq_length"))
    if limit is None:
        positions = getattr(config, "max_position_embeddings", -1)
        limits = [getattr(tokenizer, "model_max_length", None), None if positions == -1 else positions]
        limit = min((value for value in limits if value is not None), default=None)
    return int(limit) if limit is not None and limit < _NO_LIMIT else None
