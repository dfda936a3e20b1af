"""``export_base``: a checkpoint to the base of a deployment, or to another variant of it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from adalink.export.architectures import architecture_of
from adalink.export.base.files import check_common, describe_base, metadata_of, write_common
from adalink.export.base.generation import report
from adalink.export.base.gguf_file import check_base, register_file
from adalink.export.base.head_table import share_with_head
from adalink.export.base.older_base import name_missing, take_up
from adalink.export.base.pooling import report_pooling
from adalink.export.base.quantize import GGUF
from adalink.export.base.request import (
    LLAMA_CPP,
    TARGETS,
    check_free,
    check_model,
    check_place,
    check_settings,
    check_unchanged,
    codes_file,
    quantized_types,
    weight_stamps,
)
from adalink.export.base.table import write_table
from adalink.export.base.variant import ONE_BACKEND, BaseSource, write_variant
from adalink.export.writer import open_writer
from adalink.runtime.errors import ConfigError, ContractError, ModelError
from adalink.runtime.storage.manifest import SCHEMA_VERSION, Base, Manifest, Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

    from adalink.training.models.stand_ins import StandIns

_TOKENIZER_SOURCES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
)

Progress = Callable[[str], None]


def export_base(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    dtype: str = "float32",
    target: str = "onnxruntime-cpu",
    quantization: str | None = None,
    modalities: tuple[str, ...] = ("text",),
    replace: bool = False,
    copy: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor: BaseImageProcessor | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Export a base model into a new deployment, or as another variant of the base of an existing one.

    Args:
        model: a Hugging Face folder, a GGUF file, a hub id, or a loaded model, which is not changed.
        out: the deployment folder.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``: of the weights, of ``inputs_embeds`` and of the outputs.
        target: one of ``TARGETS``; each is one variant, in ``base/<target>/``.
        quantization: one of ``adalink.export.base.quantize.SCHEMES``: a variant of that name with quantised matrices;
            ``"gguf"`` keeps the codes of a GGUF file.
        modalities: input modalities, ``"text"`` first. The caller's own encoder computes embeddings of the others, and
            adapters may have weights for any of them. A model that takes images has ``"image"`` by itself, and its
            vision encoder is exported beside it.
        replace: whether to replace an existing variant of that name.
        copy: whether the GGUF file of the target ``"llama.cpp"`` is copied where it could be linked.
        tokenizer: tokenizer of a loaded model; a checkpoint brings its own.
        image_processor: image processor of a loaded model that takes images; a checkpoint brings its own.
        progress: callback, called with one line per step.

    Returns:
        The deployment's manifest.

    Raises:
        ModelError: the model cannot be loaded or exported, or its files changed meanwhile.
        ContractError: the deployment holds another base, or the same with another dtype, tokenizer or image
            processor.
        IntegrityError: a file of the deployment that a further variant would share is missing or altered.
        DeploymentError: the variant exists, or the folder cannot be written.
    """
    from adalink.export.vision.tower import describe_images, language_model, write_vision
    from adalink.training.models.loading import base_fingerprint, input_embedding, open_checkpoint, weights_digest
    from adalink.training.models.prefix_lm import has_bidirectional_prompt
    from adalink.training.models.sentence_files import read_pooling
    from adalink.training.models.source import display_name, gguf_file
    from adalink.training.models.stand_ins import StandIns
    from adalink.training.models.vision import find_image_processor

    check_settings(dtype, target, quantization, modalities)
    variant = quantization or target
    check_place(Path(out), variant, replace=replace)
    progress = progress or (lambda line: None)
    codes = codes_file(model) if quantization == GGUF else None
    stamps = weight_stamps(model)
    if isinstance(model, (str, Path)):
        check_model(model, Path(out))
        if codes is None and target != LLAMA_CPP and (types := quantized_types(model)):
            progress(f"{display_name(model)} has matrices in {' and '.join(types)}: --quantize gguf keeps their codes")
        progress(f"loading {display_name(model)}")
        (checkpoint, stand_ins), name = open_checkpoint(model), display_name(model)
        loaded, unused = checkpoint.model, checkpoint.unused_tensors
        if unused:
            progress(f"left out, since no output of the base depends on it: {', '.join(unused)}")
        tokenizer = tokenizer or _find_tokenizer(model)
        pooling, gguf = read_pooling(model, tokenizer, loaded.config), gguf_file(model)
    else:
        stand_ins = StandIns()
        loaded, name = stand_ins.skeleton(model).eval(), display_name(model.name_or_path or type(model).__name__)
        unused, pooling, gguf = (), None, None
    whole, loaded = loaded, language_model(loaded)
    architecture = architecture_of(loaded, bidirectional_prompt=has_bidirectional_prompt(whole))
    if architecture.bidirectional_prompt and quantization is not None:
        raise ConfigError(
            f"quantization {quantization!r} is for bases whose attention is causal: its cost is measured as the "
            f"perplexity of a text, and prompts of {name} attend in both directions; leave it out"
        )
    if target == LLAMA_CPP:
        gguf = check_base(architecture, name, gguf, has_vision=whole is not loaded)
    if architecture.position_axes > 1 and not set(TARGETS[target]) & set(ONE_BACKEND):
        raise ConfigError(
            f"target {target!r} is for {', '.join(TARGETS[target])}, where positions that follow the grid of an image "
            f"are not supported: choose the target {' or '.join(ONE_BACKEND)}"
        )
    _check_unhooked(whole)
    vision = preprocessor = None
    if whole is not loaded:
        _in_dtype(whole, "float32", stand_ins)
        language = {id(parameter) for parameter in loaded.parameters()}
        stand_ins.fill(parameter for parameter in whole.parameters() if id(parameter) not in language)
        if image_processor is None and isinstance(model, (str, Path)):
            image_processor = find_image_processor(model)
        vision, preprocessor = describe_images(whole, image_processor, tokenizer)
        modalities = tuple(dict.fromkeys(("text", "image", *modalities)))
    progress("hashing the weights")
    digests = base_fingerprint(loaded, stand_ins), weights_digest(whole, stand_ins)
    loaded = _in_dtype(loaded, dtype, stand_ins)
    with open_writer(out, create=True) as writer:
        base = describe_base(loaded, architecture, name, digests, dtype, modalities, tokenizer, vision)
        base = described = msgspec.structs.replace(base, unused_tensors=unused, pooling=pooling)
        variants: dict[str, Variant] = {}
        if writer.current is not None:
            # Another file with the same embeddings is another form of the base.
            _check_same_base(writer.current.base, base, Path(out), has_weights=target != LLAMA_CPP)
            check_common(Path(out), writer.current, base, tokenizer, preprocessor)
            variants = dict(writer.current.variants)
            check_free(writer.current, variant, Path(out), replace=replace)
            base = take_up(writer.current.base, described)
            for line in name_missing(base, described):
                progress(line)
        else:
            with stand_ins.filled(input_embedding(loaded).parameters()):
                base = write_table(writer, base, loaded, gguf, progress)
            write_common(writer, base, tokenizer)
            if vision is not None and preprocessor is not None:
                progress(f"tracing {vision.graph}")
                write_vision(writer, vision, whole, preprocessor, metadata_of(base), stand_ins)
        for line in (*report(base.generation), *report_pooling(base)):
            progress(line)
        if target == LLAMA_CPP and gguf is not None:
            check_unchanged(stamps)
            variants[variant] = register_file(writer, base, gguf, digests[1], copy=copy)
            stamps = weight_stamps(gguf)  # a link is a change of the file's state
        else:
            source = BaseSource(loaded, architecture, base, stand_ins)
            variants[variant] = write_variant(writer, source, target, quantization, codes, progress)
        if target != LLAMA_CPP and all(base.embeddings not in kept.files for kept in variants.values()):
            with stand_ins.filled(input_embedding(loaded).parameters()):
                base = share_with_head(writer, base, variants[variant], loaded, progress)
        check_unchanged(stamps)
        progress("hashing and committing")
        current = writer.current
        return writer.commit(
            Manifest(
                schema_version=SCHEMA_VERSION,
                kit_version=version("adalink-kit"),
                base=base,
                variants=variants,
                tasks=current.tasks if current else {},
                files={},
            )
        )


def _in_dtype(model: PreTrainedModel, dtype: str, stand_ins: StandIns) -> PreTrainedModel:
    """The model on the CPU, its weights in ``dtype``.

    Rotary frequencies stay in float32, as in transformers: rounded to 11 bits they turn position 4,000 by up to a
    radian too much.

    Raises:
        ModelError: the weights are quantised.
    """
    import torch

    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if "inv_freq" in name}
    try:
        stand_ins.convert(model, getattr(torch, dtype))
        model.to(getattr(torch, dtype)).to("cpu").requires_grad_(False)
    except ValueError as error:  # what transformers says of bitsandbytes and GPTQ
        raise ModelError(
            f"the weights of this {type(model).__name__} are quantised and cannot be exported: {error}; export the "
            "original checkpoint, with --quantize if it shall be small"
        ) from error
    for name, values in kept.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, values.cpu())
    return model


def _check_unhooked(model: PreTrainedModel) -> None:
    """An attached adapter must not be baked into the base; raises ``ModelError``."""
    from adalink.training.models.loading import input_embedding
    from adalink.training.models.vision import image_side

    side = image_side(model)
    for what, module in (("input embedding", input_embedding(model)), ("projector", side.projector if side else None)):
        if module is not None and module._forward_hooks:
            raise ModelError(
                f"the {what} of this {type(model).__name__} has a hook, such as an attached adapter; the base is "
                "exported without one: call detach() first"
            )


def _check_same_base(current: Base, new: Base, folder: Path, *, has_weights: bool) -> None:
    """Refuse to mix two bases in one deployment; raises ``ContractError``. ``has_weights``: compare all weights."""
    fields = ("fingerprint", "architecture", "embedding_dtype", "vocab_size", "hidden_size", "cache", "modalities")
    for field in (*fields, "max_positions", "vision", *(("weights_digest",) if has_weights else ())):
        current_value, new_value = getattr(current, field), getattr(new, field)
        if field == "vision" and current_value and new_value:  # the prompt form is the tokenizer's, see check_common
            current_value, new_value = (
                msgspec.structs.replace(vision, prompt_form=None) for vision in (current_value, new_value)
            )
        if current_value != new_value and not (field == "weights_digest" and not current_value):  # older kits lack it
            raise ContractError(
                f"deployment {folder} holds base {current.name!r} with {field} {current_value}, but {new.name!r} has "
                f"{field} {new_value}: variants share one base and dtype; export into another folder"
            )


def _find_tokenizer(spec: str | Path) -> PreTrainedTokenizerBase | None:
    """Tokenizer of a checkpoint; ``None`` for a folder that has no tokenizer files at all."""
    from adalink.training.models.loading import load_tokenizer

    folder = Path(spec).expanduser()
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_SOURCES):
        is_gguf = any(folder.glob("*.gguf"))
        return load_tokenizer(spec) if is_gguf else None
    return load_tokenizer(spec)
