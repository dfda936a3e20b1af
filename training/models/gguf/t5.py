"""T5 as a GGUF file: what llama.cpp reads from the tensors that are there, since no key says it.

transformers takes each such file for a gated one, with the activation of the other form. Rules: llama.cpp's
``src/models/t5.cpp`` for the feed-forward layers, and T5's own configs for the head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import ModelError
from adalink.training.models.gguf.header import GgufHeader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEAD = "output.weight"
# No model uses it, but first checkpoints of T5 have it.
UNUSED_TENSOR = "dec.blk.0.cross_attn_rel_b.weight"
# A head of its own is far from the embeddings: unrelated matrices are at a distance of 1 or more.
_NEAR = 0.5


def repair_t5(header: GgufHeader, config: Any) -> None:
    """Put a config right, in place, by the tensors of the file.

    Raises:
        ModelError: the model is no T5, or only some of its layers are gated.
    """
    if config.model_type != "t5":
        raise ModelError(
            f"base model {header.name}: it is a {config.model_type} in the layout of T5, expected t5: its layers have "
            "position biases of their own; export the original checkpoint instead"
        )
    layers = {name.rpartition(".blk.")[0] + name.split(".")[2] for name in header.tensors if ".blk." in name}
    gates = sum(name.endswith("ffn_gate.weight") for name in header.tensors)
    if gates not in (0, len(layers)):
        raise ModelError(
            f"base model {header.name}: {gates} of its {len(layers)} layers have a tensor ffn_gate; expected all or "
            "none: download the file again"
        )
    config.feed_forward_proj = "gated-gelu" if gates else "relu"
    config.dense_act_fn, config.is_gated_act = ("gelu_new" if gates else "relu"), bool(gates)
    config.scale_decoder_outputs = _HEAD not in header.tensors
    config.tie_word_embeddings = True  # so does the class; it lets go of a head that is in the file


def check_t5_head(header: GgufHeader, model: PreTrainedModel) -> None:
    """Check that a head of its own is one, since only a shared one is scaled.

    Raises:
        ModelError: it is the embeddings once more.
    """
    if _HEAD not in header.tensors:
        return
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    distance = float(((head - embeddings).norm() / embeddings.norm()).detach())
    if distance < _NEAR:
        raise ModelError(
            f"base model {header.name}: its tensor {_HEAD!r} holds the embeddings once more, so that the file does not "
            "say whether the head is scaled: remove the tensor if they are shared, or export the original checkpoint"
        )
