"""One row through a model in PyTorch, with its adapter, soft prompt, images and labels."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adalink.runtime.arrays import Array
from adalink.runtime.storage.manifest import Base
from adalink.tools.parity.reference.images import Pixels, pixel_tensors
from adalink.tools.parity.reference.input_side import InputSide
from adalink.tools.parity.reference.known_outputs import RowKey
from adalink.tools.parity.reference.position_labels import NO_LABELS, PositionLabels, position_maps

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Row:
    """A row to run.

    Attributes:
        ids: the row's tokens.
        decoder_ids: decoder tokens of an encoder-decoder, else ``None``.
        prompt_length: length of the prompt within ``ids``; the rest is generated. All of them by default.
        pixels: the row's images as the model takes them.
        labels: labels of the row's positions.
    """

    ids: list[int]
    decoder_ids: list[int] | None = None
    prompt_length: int | None = None
    pixels: Pixels | None = None
    labels: PositionLabels = NO_LABELS

    def key(self, kind: str) -> RowKey | None:
        """What tells a row of text with generated tokens, of a base of some kind; ``None`` for any other."""
        if self.pixels is not None or self.labels is not NO_LABELS:
            return None
        if self.decoder_ids is not None:
            return RowKey(tuple(self.ids), tuple(self.decoder_ids))
        if kind != "decoder" or self.prompt_length is None:
            return None
        return RowKey(tuple(self.ids[: self.prompt_length]), tuple(self.ids[self.prompt_length :]))


def run_row(model: Any, attached: Any, input_side: InputSide | None, base: Base, row: Row) -> dict[str, Array]:
    """Outputs by name in the model's precision, without those of a soft prompt.

    A decoder's logits behind a prompt begin at its last position.

    Args:
        model: the model.
        attached: the adapter that is attached to it, if any.
        input_side: the adapter's soft prompt, table or KV prefix, if it has one.
        base: the contract.
        row: the row.
    """
    import torch

    from adalink.training.models.prefix_lm import prompt_inputs

    ids, labels, length = torch.tensor([row.ids]), row.labels, len(row.ids)
    images = {} if row.pixels is None else pixel_tensors(model, row.pixels)
    if "image_grid_thw" in images:  # from embeddings alone the model cannot count its positions
        is_image = (ids == model.config.image_token_id).int()
        images["position_ids"] = model.base_model.get_rope_index(ids, is_image, images["image_grid_thw"])[0]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if attached is not None:
            maps = position_maps(attached.config.modalities, base, length, row.prompt_length, labels)
            stack.enter_context(attached.positions(**maps))
        inputs, soft_tokens = {"input_ids": ids}, 0
        if input_side is not None:
            is_text = torch.tensor([labels.is_text(length)])
            if row.pixels is not None and base.vision is not None:
                is_text = ids != base.vision.image_token_id
            embeds = input_side.embeds(model, ids, row.prompt_length, is_text, **images)
            inputs = {"inputs_embeds": embeds, **input_side.cache_inputs(model, embeds)}
            soft_tokens = input_side.soft_tokens
        if labels.token_types is not None:
            inputs["token_type_ids"] = torch.tensor([[0] * soft_tokens + labels.token_types])
        prompt = soft_tokens + (length if row.prompt_length is None else row.prompt_length)
        inputs |= prompt_inputs(model, (torch.arange(soft_tokens + length) < prompt)[None])
        if base.kind == "encoder-decoder":
            outputs = model(**inputs, decoder_input_ids=torch.tensor([row.decoder_ids]))
            return {
                "last_hidden_state": _array(outputs.encoder_last_hidden_state)[soft_tokens:],
                "logits": _array(outputs.logits),
            }
        if base.kind == "encoder":
            return {"last_hidden_state": _array(model(**inputs, **images).last_hidden_state)[soft_tokens:]}
        kept = length if row.prompt_length is None else length - row.prompt_length + 1
        return {"logits": _array(model(**inputs, **images, **_logits_to_keep(model, kept)).logits)[-kept:]}


def _logits_to_keep(model: Any, kept: int) -> dict[str, int]:
    """The argument that lets a model compute its last logits alone, if it takes that."""
    takes_it = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": kept} if takes_it else {}


def _array(tensor: torch.Tensor) -> Array:
    return tensor[0].numpy()
