"""Tiny seeded models of every supported family, each of its real transformers class.

Weights are random but neither small nor symmetric: biases and norm weights differ from their initial zeros and ones, so
a wrong position, mask or missing term changes the output visibly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB_SIZE = 96
HIDDEN_SIZE = 48
LAYERS = 2
MAX_POSITIONS = 64

_DECODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _fill(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Seed every parameter: matrices by fan-in, vectors near what they scale (norms) or shift (biases)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                is_table = "embed" in name or "wte" in name or "wpe" in name or "shared" in name
                parameter.copy_(noise * (0.5 if is_table else 1.2 * parameter.shape[-1] ** -0.5))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def llama() -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _fill(LlamaForCausalLM(LlamaConfig(**_DECODER, tie_word_embeddings=True)), 1)


def qwen2() -> PreTrainedModel:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _fill(Qwen2ForCausalLM(Qwen2Config(**_DECODER, tie_word_embeddings=False)), 2)


def qwen3() -> PreTrainedModel:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _fill(Qwen3ForCausalLM(Qwen3Config(**_DECODER, tie_word_embeddings=True)), 3)


def gemma3() -> PreTrainedModel:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **_DECODER, query_pre_attn_scalar=16, sliding_window=8, layer_types=kinds, tie_word_embeddings=True
    )
    return _fill(Gemma3ForCausalLM(config), 4)


def gemma() -> PreTrainedModel:
    from transformers import GemmaConfig, GemmaForCausalLM

    return _fill(GemmaForCausalLM(GemmaConfig(**_DECODER, tie_word_embeddings=True)), 22)


def mistral() -> PreTrainedModel:
    from transformers import MistralConfig, MistralForCausalLM

    return _fill(MistralForCausalLM(MistralConfig(**_DECODER, sliding_window=None)), 5)


def phi3() -> PreTrainedModel:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(**_DECODER, original_max_position_embeddings=MAX_POSITIONS)
    return _fill(Phi3ForCausalLM(config), 6)


def gpt2() -> PreTrainedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=HIDDEN_SIZE,
        n_layer=LAYERS,
        n_head=6,
        n_positions=MAX_POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _fill(GPT2LMHeadModel(config), 7)


def bert() -> PreTrainedModel:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
    )
    return _fill(BertModel(config), 8)


def t5() -> PreTrainedModel:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=HIDDEN_SIZE,
        d_ff=80,
        d_kv=12,
        num_heads=4,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    return _fill(T5ForConditionalGeneration(config), 9)


# "@" in the tests' tokenizer (helpers.tiny_tokenizer), so that a prompt can be written as text.
IMAGE_TOKEN = 36
IMAGE_SIZE = 24
IMAGE_TOKENS = 9


def llava(**settings: Any) -> PreTrainedModel:
    """A vision tower of CLIP's class, a projector and a language model of Llama's: nine tokens an image."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    text = LlamaConfig(**_DECODER, tie_word_embeddings=False)
    values = {"image_token_index": IMAGE_TOKEN, "image_seq_length": IMAGE_TOKENS} | settings
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **values))
    with torch.no_grad():
        model.model.vision_tower.embeddings.class_embedding.zero_()  # a vector that starts random
    return _fill(model, 10)


def fast_vlm() -> PreTrainedModel:
    """A convolutional tower, whose features are a map, before the same language model: nine tokens an image."""
    from transformers import EfficientNetConfig, FastVlmConfig, FastVlmForConditionalGeneration, LlamaConfig

    vision = EfficientNetConfig(
        image_size=IMAGE_SIZE,
        width_coefficient=0.025,
        depth_coefficient=1.0,
        in_channels=[320, 320],
        out_channels=[320, 640],
        kernel_sizes=[3, 5],
        strides=[2, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 2],
        hidden_dim=32,
        hidden_size=32,
        hidden_act="relu6",
    )
    text = LlamaConfig(**_DECODER, tie_word_embeddings=False)
    config = FastVlmConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    model = _fill(FastVlmForConditionalGeneration(config), 10)
    generator = torch.Generator().manual_seed(12)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


# Of the tests' tokenizer for tiles (helpers.tiny_tokenizer).
TILE_VOCAB_SIZE = 112
TILE_IMAGE_TOKEN = 99
TILE_EDGE = 16
TILE_TOKENS = 4


def idefics3(kind: str = "idefics3", **settings: Any) -> PreTrainedModel:
    """A tower of sixteen patches a tile, a connector that makes four tokens of them, a language model of Llama's."""
    from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig

    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(**_DECODER | {"vocab_size": TILE_VOCAB_SIZE, "max_position_embeddings": 256})
    values: dict[str, Any] = {
        "vision_config": vision | {"image_size": TILE_EDGE, "patch_size": 4},
        "text_config": text,
        "scale_factor": 2,
        "image_token_id": TILE_IMAGE_TOKEN,
    }
    config = AutoConfig.for_model(kind, **values | settings)
    return _fill(AutoModelForImageTextToText.from_config(config), 11)


def smolvlm(**settings: Any) -> PreTrainedModel:
    """The same with a head that shares its matrix with the embedding table."""
    return idefics3("smolvlm", tie_word_embeddings=True, **settings)


# Of the tests' tokenizer for prompts that attend in both directions (helpers.tiny_tokenizer).
PREFIX_IMAGE_TOKEN = 98


def paligemma(**settings: Any) -> PreTrainedModel:
    """A vision tower of SigLIP's class and a language model of Gemma's with one head of keys: nine tokens an image.

    Its head is its own, and its embeddings are as large as other models', so that what a token is does not drown what
    it sees.
    """
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        vision_use_head=False,
    )
    text = GemmaConfig(**_DECODER | {"vocab_size": TILE_VOCAB_SIZE, "num_key_value_heads": 1})
    values: dict[str, Any] = {
        "image_token_index": PREFIX_IMAGE_TOKEN,
        "projection_dim": HIDDEN_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "tie_word_embeddings": False,
    }
    config = PaliGemmaConfig(vision_config=vision, text_config=text, **values | settings)
    model = _fill(PaliGemmaForConditionalGeneration(config), 23)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(HIDDEN_SIZE**-0.5)
    return model


# Of the models that take patches: patches of 4 pixels, four of them a piece, windows of two by two pieces.
PATCH_EDGE = 4
PIECE_EDGE = 8


def _qwen_vl(kind: str, vision: dict[str, Any], sections: dict[str, Any], **settings: Any) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForImageTextToText

    values: dict[str, Any] = {
        "vision_config": vision | {"num_heads": 4, "patch_size": PATCH_EDGE, "spatial_merge_size": 2},
        "text_config": _DECODER
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 256}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, **sections}},
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 95,
        "vision_start_token_id": 30,
        "vision_end_token_id": 32,
    }
    return _fill(AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **values | settings)), 12)


def qwen2_vl(**settings: Any) -> PreTrainedModel:
    """A tower whose layers all look at the whole image."""
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": HIDDEN_SIZE, "mlp_ratio": 2}
    return _qwen_vl("qwen2_vl", vision, {"mrope_section": [2, 3, 3]}, **settings)


def qwen2_5_vl(whole: tuple[int, ...] = (1,), **settings: Any) -> PreTrainedModel:
    """A tower of three layers, all but ``whole`` looking through windows; a language model that turns by three axes."""
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 40, "out_hidden_size": HIDDEN_SIZE}
    windows = {"window_size": 2 * PIECE_EDGE, "fullatt_block_indexes": list(whole)}
    return _qwen_vl("qwen2_5_vl", vision | windows, {"mrope_section": [2, 3, 3]}, **settings)


def qwen3_vl(**settings: Any) -> PreTrainedModel:
    """A tower that hands states of its first layer to the first layer of the language model, beside its embeddings."""
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 40, "out_hidden_size": HIDDEN_SIZE}
    deep = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return _qwen_vl("qwen3_vl", vision | deep, {"mrope_section": [3, 3, 2], "mrope_interleaved": True}, **settings)


DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma3": gemma3,
    "mistral": mistral,
    "phi3": phi3,
    "gpt2": gpt2,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {**DECODERS, "bert": bert, "t5": t5}


def token_ids(seed: int, rows: int = 3, columns: int = 7) -> torch.Tensor:
    """Seeded token ids with shape ``(rows, columns)``, special ids 0 to 2 left out."""
    return torch.randint(3, VOCAB_SIZE, (rows, columns), generator=torch.Generator().manual_seed(seed))
