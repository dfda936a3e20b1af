"""Base models: load a checkpoint without ever unpickling it, and fingerprint it by its embeddings.

A base is a Hugging Face folder, a GGUF file (or a folder whose only model file is one) or a hub id.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import AdaLinkError, ConfigError, ModelError
from adalink.runtime.storage.digest import digest_bytes, fingerprint_rows
from adalink.training.models.accounting import account_for_tensors
from adalink.training.models.base_kind import auto_class
from adalink.training.models.gguf.checked import CheckedGguf
from adalink.training.models.gguf.tokenizer import load_gguf_tokenizer
from adalink.training.models.gguf.weights import is_lazy, load_lazily
from adalink.training.models.hub_access import download_options
from adalink.training.models.lazy_files import is_accounted, lazy_safetensors
from adalink.training.models.size_limit import limit_model_size
from adalink.training.models.source import Source, display_name, find_source
from adalink.training.models.stand_ins import StandIns
from adalink.training.models.weight_files import (
    ADAPTER_CONFIG,
    WeightFiles,
    check_config,
    fetch_weights,
    find_weight_files,
    refuse_adapter,
)
from adalink.training.models.weights import digest_weight, read_pieces

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "float16", "bfloat16")
_POOLER = "pooler"  # a part of encoders that checkpoints may leave out, and that nothing here uses


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        model: the model, in eval mode, on the CPU.
        unused_tensors: tensors and files that are left out on purpose, such as a classifier; ``*`` is the number of a
            layer.
    """

    model: PreTrainedModel
    unused_tensors: tuple[str, ...]


def load_base(spec: str | Path, *, dtype: str = "float32") -> PreTrainedModel:
    """The model of ``load_checkpoint``, in eval mode, on the CPU; raises ``ModelError`` as it does."""
    return load_checkpoint(spec, dtype=dtype).model


def open_checkpoint(spec: str | Path) -> tuple[Checkpoint, StandIns]:
    """Open a base model as ``load_checkpoint`` loads it, in float32, with its matrices left in the files.

    Returns:
        The checkpoint, whose model has stand-ins for matrices, and what they stand for. Of a checkpoint whose matrices
        transformers computes from others, the model has them all, and there are no stand-ins.
    """
    stand_ins = StandIns()
    checkpoint = load_checkpoint(spec, stand_ins=stand_ins)
    return checkpoint, stand_ins


def load_checkpoint(spec: str | Path, *, dtype: str = "float32", stand_ins: StandIns | None = None) -> Checkpoint:
    """Load a base model, and account for every tensor of its files.

    The class follows the checkpoint: a causal language model, a vision-language model, an encoder-decoder with its
    head, or, for encoders such as BERT, the bare model.

    Args:
        spec: a Hugging Face folder, a ``.gguf`` file, a folder with one ``.gguf`` file, or a hub id.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; fingerprints are those of the float32 model.
        stand_ins: takes up the matrices, which are then not read; empty, and left empty where they must be. For
            float32 alone, in which their marks are exact.

    Raises:
        ModelError: the checkpoint is missing, pickled, quantised or incomplete, its architecture is unknown, or it
            holds a tensor that belongs to a layer and is not used.
    """
    import torch
    from transformers import AutoConfig

    if dtype not in DTYPES:
        raise ModelError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    assert stand_ins is None or dtype == "float32"
    source = find_source(spec)
    gguf = None if source.gguf_path is None else CheckedGguf(source.gguf_path)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    is_local = Path(source.origin).is_dir()
    files = _weight_files(source, display_name(spec)) if is_local else None
    try:
        if gguf is not None:
            gguf.check()
        config = AutoConfig.from_pretrained(source.origin, **source.options())
        if not is_local:  # a hub that cannot be reached has said so by now
            files = _weight_files(source, display_name(spec))
        if gguf is not None:
            gguf.repair(config)
        stored = gguf.numbers if gguf is not None else files.numbers if files is not None else None
        with ExitStack() as stack:
            if stored is not None:
                stack.enter_context(limit_model_size(stored, display_name(spec)))
            if gguf is not None and stand_ins is not None and is_lazy(gguf.header):
                assert source.gguf_path is not None
                model, info = load_lazily(gguf.header, source.gguf_path, auto_class(config), config, stand_ins)
            else:
                if stand_ins is not None and gguf is None:
                    stack.enter_context(lazy_safetensors(stand_ins, torch_dtype))
                model, info = auto_class(config).from_pretrained(
                    source.origin,
                    config=config,
                    dtype=torch_dtype,
                    output_loading_info=True,
                    adapter_kwargs=download_options(source.origin),  # it looks for an adapter, by options of its own
                    **source.options(),
                    **({} if source.gguf_file else {"use_safetensors": True}),
                )
    except AdaLinkError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and its parsers' own classes
        what = "" if Path(source.origin).exists() else "there is no such file or folder here, and as a hub id "
        raise ModelError(
            f"base model {display_name(spec)}: {what}transformers cannot load it: {type(error).__name__}: {error}. "
            "Expected a supported architecture with safetensors or GGUF weights"
        ) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        refuse_adapter(display_name(spec))
    if stand_ins is not None and not is_accounted(stand_ins, model, info):
        stand_ins.clear()
        return load_checkpoint(spec, dtype=dtype)
    unused = [] if source.gguf_file else _account(source, files, model, info, display_name(spec), stand_ins)
    missing = sorted(name for name in info["missing_keys"] if _POOLER not in name)
    if missing:
        raise ModelError(
            f"base model {display_name(spec)}: {len(missing)} weights are missing, the first {missing[0]!r}, and would "
            f"be random; expected a complete {type(model).__name__} checkpoint"
        )
    if gguf is not None:
        gguf.finish(model)
    return Checkpoint(model.eval(), tuple(unused))


def checkpoint_folder(spec: str | Path) -> Path | None:
    """Folder with the safetensors of a base, that of a hub id in the cache; ``None`` for a GGUF file.

    Raises:
        ModelError: there is no such base.
    """
    return _weights_folder(find_source(spec))


def load_tokenizer(spec: str | Path, *, assume_pretokenizer: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a base.

    Args:
        spec: the base, as for ``load_base``.
        assume_pretokenizer: the pre-tokenizer of a GGUF file that does not name a known one, such as ``"gpt-2"``
            (`adalink.training.models.gguf.pretokenizer`).

    Raises:
        ModelError: there is none, or it cannot be loaded.
        ConfigError: a GGUF file does not say how texts are split, and nothing is assumed; or the other way round.
    """
    from transformers import AutoTokenizer

    source = find_source(spec)
    if assume_pretokenizer is not None and source.gguf_file is None:
        raise ConfigError(
            f"base model {display_name(spec)} is no GGUF file and brings its own pre-tokenizer: leave "
            "--assume-pretokenizer out"
        )
    try:
        if source.gguf_path is not None:
            CheckedGguf(source.gguf_path).check()
            return load_gguf_tokenizer(source.gguf_path, assume_pretokenizer)
        check_config(Path(source.origin), display_name(spec))
        tokenizer = AutoTokenizer.from_pretrained(source.origin, **source.options())
        _try_tokenizer(tokenizer)
        return tokenizer
    except AdaLinkError:
        raise
    except Exception as error:  # as in load_base
        raise ModelError(
            f"base model {display_name(spec)}: no usable tokenizer: {type(error).__name__}: {error}. "
            "Expected tokenizer.json beside the weights, or a GGUF file that carries one"
        ) from error


def _try_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Encode a text, since settings of a wrong type show when they are used; padding and truncation stay as they are.

    Raises:
        Exception: whatever the tokenizer raises.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)
    tokenizer("a")  # which switches both off
    if backend is not None and truncation is not None:
        backend.enable_truncation(**truncation)
    if backend is not None and padding is not None:
        backend.enable_padding(**padding)


def base_fingerprint(model: torch.nn.Module, stand_ins: StandIns | None = None) -> str:
    """Fingerprint of a base: the digest of its input embedding matrix as stored, in float32.

    Args:
        model: the model.
        stand_ins: what its matrices stand for, if it was opened with stand-ins.

    Raises:
        ModelError: the model has no single input embedding matrix.
    """
    import torch

    weight = (stand_ins or StandIns()).source(embedding_matrix(model))
    rows, width = weight.shape
    return fingerprint_rows((rows, width), (piece.numpy() for piece in read_pieces(weight, torch.float32)))


def weights_digest(model: torch.nn.Module, stand_ins: StandIns | None = None) -> str:
    """Digest of all weights of a model, in float32; it tells models with the same embeddings apart.

    SHA-256 of one line per parameter, with its shape and the digest of its values. Lines are sorted, since releases of
    transformers name parameters differently. A pooler is left out, since a checkpoint may lack it.

    Args:
        model: the model.
        stand_ins: as for ``base_fingerprint``.
    """
    known = stand_ins or StandIns()
    lines = [
        f"{tuple(parameter.shape)} {digest_weight(known.source(parameter))}"
        for name, parameter in model.named_parameters()
        if _POOLER not in name
    ]
    return digest_bytes("\n".join(sorted(lines)).encode())


def embedding_matrix(model: torch.nn.Module) -> torch.Tensor:
    """The input embedding matrix as stored, with shape ``(vocab, d)``; raises ``ModelError`` if there is none."""
    import torch

    weight = getattr(input_embedding(model), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise ModelError(
            f"{type(model).__name__} has no input embedding matrix with shape (vocab, d): its embeddings cannot be "
            "fingerprinted or adapted"
        )
    return weight


def input_embedding(model: torch.nn.Module) -> torch.nn.Module:
    """The module that turns token ids into embeddings; raises ``ModelError`` if the model has none."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        module = getter() if callable(getter) else None
    except NotImplementedError:
        module = None
    if module is None:
        raise ModelError(
            f"{type(model).__name__} has no input embedding module: expected a transformers model that embeds token ids"
        )
    return module  # type: ignore[no-any-return]


def max_positions(model: PreTrainedModel) -> int | None:
    """Maximum sequence length of the model; ``None`` for relative positions."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        padding: int | None = getattr(module, "padding_idx", None)
        if positions is not None and padding is not None and name.endswith("position_embeddings"):
            return positions - padding - 1  # of the table: RoBERTa starts behind its padding id
    return positions


def _account(
    source: Source,
    files: WeightFiles | None,
    model: PreTrainedModel,
    info: dict[str, Any],
    name: str,
    stand_ins: StandIns | None,
) -> list[str]:
    """Account for the tensors of a checkpoint that is loaded; those of a hub id may have come meanwhile."""
    files = files or _weight_files(source, name)
    if files is None:
        raise ModelError(f"base model {name}: its weight files are not in the hub's cache; load it from a local folder")
    return account_for_tensors(files, model, info, name, stand_ins.by_name if stand_ins is not None else {})


def _weight_files(source: Source, name: str) -> WeightFiles | None:
    """Checked weight files of a base; ``None`` for a GGUF file, and for a hub id whose files cannot be had."""
    if (Path(source.origin) / ADAPTER_CONFIG).exists():  # which transformers attaches to a GGUF file as well
        refuse_adapter(name)
    folder = _weights_folder(source)
    return None if folder is None else find_weight_files(folder, name)


def _weights_folder(source: Source) -> Path | None:
    """Folder of the safetensors; ``None`` for a GGUF file, and for a hub id whose files cannot be had."""
    if source.gguf_file is not None:
        return None
    folder = Path(source.origin)
    return folder if folder.is_dir() else fetch_weights(source.origin)
