"""Account of a checkpoint's tensors: each is in the loaded model, left out on purpose and named, or refused.

transformers drops tensors that a model has no place for, some of them without a word. A tensor that belongs to a layer
would be missed in every result; a head that nothing here computes is only named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import ModelError
from adalink.training.models.constants import find_constant
from adalink.training.models.weight_files import WeightFiles

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_POOLER = "pooler"
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|hada_\w+|lokr_\w+|oft_\w+|ia3_\w+|vera_\w+|base_layer|modules_to_save)(\.|$)")
_QUANTIZED = re.compile(
    r"(^|[._])(weight_scale(_inv)?|input_scale|scale_inv|scales?|q?zeros|zero_point|qweight|g_idx|weight_packed|"
    r"weight_shape|SCB|absmax|quant_map|nested_\w+|quant_state\S*|\w*amax)$"
)
_LAYER = re.compile(r"^(.*(?:^|\.)(?:layers?|h|blocks?))\.(\d+)\.")
# Heads that checkpoints have beside what the engine computes: of classes for other purposes, and of PPO.
_HEAD = re.compile(
    r"^(\w*head|\w*classifier|\w*_outputs|cls|score|pooler|vocab_\w+|sequence_summary|seq_relationship)\."
)
# Tensors that the published T5 checkpoints have, and that no implementation of it reads.
_NEVER_READ = re.compile(r"(^|\.)EncDecAttention\.relative_attention_bias\.weight$")


@dataclass
class _Account:
    """State of an account: what is claimed of the model, and what is left of the files."""

    state: Mapping[str, torch.Tensor]
    claimed: set[str]
    left: list[str]


def account_for_tensors(
    files: WeightFiles,
    model: PreTrainedModel,
    info: Mapping[str, Any],
    name: str,
    stand_ins: Mapping[str, torch.Tensor],
) -> list[str]:
    """Check that every tensor of a checkpoint is in the model, or left out on purpose.

    Args:
        files: the checkpoint's tensors.
        model: the model that was loaded from them.
        info: transformers' loading info: ``unexpected_keys`` and ``missing_keys``.
        name: display name of the model, for errors.
        stand_ins: stand-ins of tensors that the model has in the place of their values.

    Returns:
        Names of the tensors and files that are left out, with ``*`` for the number of a layer.

    Raises:
        ModelError: a tensor belongs to a layer and is not used, or matrices that the config ties differ.
    """
    if mismatched := sorted(str(key[0]) for key in info.get("mismatched_keys", ())):
        raise ModelError(
            f"base model {name}: {len(mismatched)} weights have another shape than config.json says, the first "
            f"{mismatched[0]!r}: correct config.json, or download the checkpoint again"
        )
    account, unexpected = _claim_by_name(files, model, info, name)
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def read(tensor: str) -> torch.Tensor:
            from safetensors import safe_open

            path = files.tensors[tensor]
            if path not in opened:
                opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            return opened[path].get_tensor(tensor)  # type: ignore[no-any-return]

        def values(tensor: str) -> torch.Tensor:
            return stand_ins[tensor] if tensor in stand_ins else read(tensor)

        left = sorted({*unexpected, *_claim_by_value(account, info, values)})
        refused = []
        for tensor in left:
            is_constant = find_constant(tensor, read, model) if tensor in files.tensors else None
            if is_constant is False:
                raise ModelError(
                    f"base model {name}: tensor {tensor!r} of the checkpoint holds other values than those that "
                    "transformers computes from config.json, and would be ignored: correct config.json"
                )
            if not (is_constant or _NEVER_READ.search(tensor) or _is_head(tensor, model)):
                refused.append(tensor)
    if refused:
        raise ModelError(f"base model {name}: {_refusal(refused, model)}")
    _check_ties(model, files.has_own_head, name)
    poolers = [tensor for tensor in files.tensors if f".{_POOLER}." in f".{tensor}"]
    return compact_names([*left, *poolers, *files.others])


def compact_names(names: Iterable[str]) -> list[str]:
    """Sorted names, with ``*`` for the numbers of layers."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names})


def _claim_by_name(
    files: WeightFiles, model: PreTrainedModel, info: Mapping[str, Any], name: str
) -> tuple[_Account, list[str]]:
    """Tensors whose name the model has, with or without the prefix of its base model; and the unexpected ones."""
    prefix, state = f"{model.base_model_prefix}.", model.state_dict()
    reported, unexpected = set(info["unexpected_keys"]), []
    account = _Account(state, set(), [])
    origins: dict[str, str] = {}
    for tensor in files.tensors:
        variants = dict.fromkeys((tensor, prefix + tensor, tensor.removeprefix(prefix)))
        if match := next((variant for variant in variants if variant in reported), None):
            reported.discard(match)
            unexpected.append(tensor)
        elif (target := next((variant for variant in variants if variant in state), None)) is None:
            account.left.append(tensor)
        elif target in origins:
            raise ModelError(
                f"base model {name}: {origins[target]!r} and {tensor!r} of the checkpoint are both the model's "
                f"{target!r}, which takes one of them; remove the other"
            )
        else:
            origins[target] = tensor
            account.claimed.add(target)
    return account, unexpected


def _claim_by_value(account: _Account, info: Mapping[str, Any], read: Any) -> list[str]:
    """Claim tensors that transformers renamed or converted; returns those that are not in the model."""
    missing = set(info["missing_keys"])
    free = {key: value for key, value in account.state.items() if key not in account.claimed and key not in missing}
    unknown = []
    for tensor in account.left:
        values = read(tensor)
        tail = ".".join(tensor.split(".")[-4:])  # the number of the layer in it: most names keep it
        keys = sorted((key for key in free if free[key].shape == values.shape), key=lambda key: not key.endswith(tail))
        key = next((key for key in keys if _is_same(values, free[key])), None)
        if key is None:
            unknown.append((tensor, values.numel()))
        else:
            account.claimed.add(key)
            del free[key]
    storages = {account.state[key].data_ptr() for key in account.claimed}
    rest = {value.data_ptr(): value.numel() for value in free.values() if value.data_ptr() not in storages}
    # What is stacked or cut while loading, such as experts, has as many numbers afterwards.
    is_converted = sum(rest.values()) == sum(size for _, size in unknown)
    return [] if is_converted else [tensor for tensor, _ in unknown]


def _is_same(stored: torch.Tensor, loaded: torch.Tensor) -> bool:
    """Whether a stored tensor, rounded to the dtype of a loaded one, is the same bit by bit."""
    import torch

    rounded, loaded = stored.to(loaded.dtype).reshape(-1), loaded.reshape(-1)
    return torch.equal(rounded, loaded) or torch.equal(rounded.view(torch.uint8), loaded.view(torch.uint8))  # NaN


def _is_head(tensor: str, model: PreTrainedModel) -> bool:
    """Whether a tensor is of a head that the model does not have; a bias of a head that it has changes its logits."""
    if _ADAPTER.search(tensor) or _QUANTIZED.search(tensor):
        return False
    match = _HEAD.match(tensor.removeprefix(f"{model.base_model_prefix}."))
    return match is not None and not hasattr(model, match[1]) and not hasattr(model.base_model, match[1])


def _refusal(tensors: list[str], model: PreTrainedModel) -> str:
    """The sentence that names tensors that belong to layers, and the repair."""
    first = next((tensor for tensor in tensors if _ADAPTER.search(tensor)), None)
    if first is not None:
        repair = (
            "it was saved with an adapter that is not merged; merge it (merge_and_unload() of peft, then "
            "save_pretrained) and export that"
        )
    elif first := next((tensor for tensor in tensors if _QUANTIZED.search(tensor)), None):
        repair = "its weights are quantised; export the original checkpoint, with --quantize if it shall be small"
    elif first := next((tensor for tensor in tensors if _is_further_layer(tensor, model)), None):
        repair = (
            "config.json says that it has fewer layers; correct num_hidden_layers, or save the model again with "
            "save_pretrained"
        )
    else:
        first = tensors[0]
        repair = (
            "config.json names another class or other settings than those it was trained with: correct it, or save the "
            "model again with save_pretrained from the class that it belongs to"
        )
    count = "1 tensor" if len(tensors) == 1 else f"{len(tensors)} tensors"
    return (
        f"{count} of the checkpoint, the first {first!r}, would be ignored: {type(model).__name__} has no place for "
        f"{'it' if len(tensors) == 1 else 'them'}: {repair}"
    )


def _is_further_layer(tensor: str, model: PreTrainedModel) -> bool:
    """Whether a tensor is of a layer beyond those of the model."""
    match = _LAYER.match(tensor)
    if match is None:
        return False
    prefix = f"{model.base_model_prefix}."
    for stem in (match[1], prefix + match[1], match[1].removeprefix(prefix)):
        try:
            layers: Any = model.get_submodule(stem)
        except AttributeError:
            continue
        return int(match[2]) >= len(layers)
    return False


def _check_ties(model: PreTrainedModel, has_own_head: bool, name: str) -> None:
    """Refuse a checkpoint whose matrices differ although the config ties them; raises ``ModelError``.

    The class of T5 ties its head in any case, and lets go of it where both matrices are in the files: theirs is said by
    ``has_own_head``.
    """
    head = getattr(model.get_output_embeddings(), "weight", None) if has_own_head else None
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        try:
            tied = model.get_parameter(target), model.get_parameter(source)
        except AttributeError:
            continue
        if tied[0] is not tied[1] and not any(parameter is head for parameter in tied):
            raise ModelError(
                f"base model {name}: config.json ties {target!r} to {source!r}, but the checkpoint holds both with "
                "different values; set tie_word_embeddings to false if both are the model's, else remove one"
            )
