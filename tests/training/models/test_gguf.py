"""GGUF files: what the file says is what the model computes, and what it cannot take is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from helpers import tiny_models
from helpers.tiny_ggufs import write_gguf

from adalink.runtime.errors import ModelError
from adalink.training.models.loading import load_base

FAMILIES = {
    "llama": tiny_models.llama,
    "qwen2": tiny_models.qwen2,
    "qwen3": tiny_models.qwen3,
    "gemma3": tiny_models.gemma3,
    "phi3": tiny_models.phi3,
    "gpt2": tiny_models.gpt2,
}
IDS = torch.tensor([[5, 17, 33, 60, 8, 91, 2, 40, 41, 42, 7, 9, 11, 13]])


def logits(model):
    with torch.no_grad():
        return model.double()(IDS).logits


@pytest.mark.parametrize("architecture", FAMILIES)
def test_equals_original_model(tmp_path, architecture):
    original = FAMILIES[architecture]()
    loaded = load_base(write_gguf(tmp_path / "tiny.gguf", original, architecture))
    assert torch.allclose(logits(loaded), logits(original), atol=1e-6)


def llama(path, **changes):
    return write_gguf(path / "tiny.gguf", tiny_models.llama(), "llama", **changes)


EXTRA = np.ones((48, 48), np.float32)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"llama.attention.sliding_window": 8},
            r"key llama.attention.sliding_window would be dropped: it is 8, and th",
        ),
        ({"llama.expert_count": 4}, r"llama.expert_count would be dropped: it is 4, and the model class has no such"),
        ({"llama.final_logit_softcapping": 30.0}, r"llama.final_logit_softcapping would be dropped: it is 30.0"),
        ({"llama.logit_scale": 0.5}, r"llama.logit_scale would be dropped"),
        (
            {"llama.attention.scale": 0.1},
            r"llama.attention.scale would be dropped: it is 0.1\d*, and .* built with 0.25",
        ),
        ({"llama.attention.value_length": 8}, r"attention.value_length would be dropped: it is 8"),
        ({"llama.attention.causal": False}, r"llama.attention.causal would be dropped: it is False"),
        ({"llama.attention.clamp_kqv": 8.0}, r"llama.attention.clamp_kqv would be dropped"),
        ({"llama.attention.max_alibi_bias": 8.0}, r"llama.attention.max_alibi_bias would be dropped"),
        ({"llama.residual_scale": 0.5}, r"llama.residual_scale would be dropped"),
        (
            {"llama.vocab_size": 97},
            r"transformers cannot load it: RuntimeError: .*mismatched_sizes|and the metadata say",
        ),
        ({"llama.new.setting": 1}, r"llama.new.setting would be dropped: it is 1, and no such setting is known"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, r"scaling.type is 'longrope'"),
        ({"llama.rope.scaling.attn_factor": 1.5}, r"attn_factor 1.5; expected none, linear or yarn"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, r"yarn_log_multiplier would be dropped"),
        ({"llama.rope.freq_base_swa": 1e4}, r"llama.rope.freq_base_swa would be dropped"),
        ({"adapter.type": "lora"}, r"key adapter.type would be dropped"),
        ({"split.count": 2}, r"one of the 2 files of a split GGUF file.*llama-gguf-split --merge"),
        ({"general.type": "adapter"}, r"general.type would be dropped: it is 'adapter'"),
    ],
)
def test_refuses_dropped_keys(tmp_path, metadata, message):
    with pytest.raises(ModelError, match=message):
        load_base(llama(tmp_path, metadata=metadata))


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.attention.sliding_window": 64},  # as long as the longest sequence
        {"llama.expert_count": 0, "llama.expert_used_count": 0, "llama.logit_scale": 1.0},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 8.0},
        {"llama.rope.scaling.factor": 1.0, "llama.rope.scaling.finetuned": False},
        {"llama.attention.scale": 0.25, "llama.attention.causal": True},
        {"general.license": "mit", "quantize.imatrix.file": "a", "somebody.note": "b", "split.count": 1},
    ],
)
def test_takes_neutral_keys(tmp_path, metadata):
    assert torch.equal(logits(load_base(llama(tmp_path, metadata=metadata))), logits(load_base(llama(tmp_path))))


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.lora_a", "blk.0.attn_q.bias", "output.weight.extra", "blk.2.attn_q.weight", "cls.weight"]
)
def test_refuses_extra_tensors(tmp_path, name):
    with pytest.raises(ModelError, match=rf"1 of its 21 tensors would be dropped, the first '{name}'"):
        load_base(llama(tmp_path, tensors={name: EXTRA}))


def test_refuses_a_part_of_a_split_file(tmp_path):
    """As the ``gguf`` package splits; only the first part says what the model is."""
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama", split_max_tensors=1)
    for name in ("token_embd.weight", "output_norm.weight"):
        writer.add_tensor(name, np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.iterdir())
    assert [path.name for path in parts] == ["tiny-00001-of-00002.gguf", "tiny-00002-of-00002.gguf"]
    for path in parts:
        with pytest.raises(ModelError, match=r"one of the 2 files of a split GGUF file.*llama-gguf-split --merge"):
            load_base(path)


def test_refuses_layers_that_it_does_not_hold_before_the_config_is_made(tmp_path, monkeypatch):
    path = llama(tmp_path, metadata={"llama.block_count": 3})
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *args, **options: pytest.fail("it was made"))
    with pytest.raises(ModelError, match="say 3 layers and it holds tensors of 2"):
        load_base(path)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # of gemma3 the config itself makes a list of them
@pytest.mark.parametrize("layers", [1_000_000, 2**32 - 1])
def test_refuses_more_layers_than_it_holds_before_it_makes_them(tmp_path, architecture, layers):
    metadata = {f"{architecture}.block_count": layers}
    path = write_gguf(tmp_path / "tiny.gguf", FAMILIES[architecture](), architecture, metadata=metadata)
    with pytest.raises(ModelError, match=f"say {layers} layers and it holds tensors of 2; expected as many"):
        load_base(path)


def test_refuses_unknown_architecture(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_models.llama(), "starcoder2")
    with pytest.raises(ModelError, match="its architecture is 'starcoder2', expected one of gemma3, gpt2, llama"):
        load_base(path)
    path = write_gguf(tmp_path / "gemma.gguf", tiny_models.llama(), "gemma")
    with pytest.raises(ModelError, match="gemma"):
        load_base(path)


# Rotary scalings, as a transformers config says them. The originals are built from it, the files from the other words.
ROPES = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    "factor-alone": ({"rope_type": "linear", "factor": 4.0}, {"factor": 4.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"type": "yarn", "factor": 4.0, "original_context_length": 16},
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_scales_positions(tmp_path, name):
    scaling, keys = ROPES[name]
    original = with_rope(tiny_models.llama(), scaling)
    metadata = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    loaded = load_base(llama(tmp_path, metadata=metadata))
    assert torch.allclose(logits(loaded), logits(original), atol=1e-6)
    assert not torch.allclose(logits(loaded), logits(tiny_models.llama()), atol=1e-3)


def test_takes_rotary_divisors(tmp_path):
    """Llama 3.1's scaling, which a file holds as divisors, by the formula of llama.cpp's converter."""
    original = with_rope(
        tiny_models.llama(),
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 8192},
        theta=5e5,
    )
    divisors = []
    for frequency in 1.0 / 5e5 ** (np.arange(0, 16, 2) / 16):
        wave = 2 * np.pi / frequency
        smooth = (8192 / wave - 1.0) / 3.0
        divisors.append(1.0 if wave < 2048 else 8.0 if wave > 8192 else 1 / ((1 - smooth) / 8.0 + smooth))
    assert any(1 < divisor < 8 for divisor in divisors)
    tensors = {"rope_freqs.weight": np.array(divisors, np.float32)}
    loaded = load_base(llama(tmp_path, tensors=tensors, metadata={"llama.rope.freq_base": 5e5}))
    assert torch.allclose(logits(loaded), logits(original), atol=1e-5)
    tensors["rope_freqs.weight"][3] *= 1.5
    with pytest.raises(ModelError, match=r"rope_freqs\.weight divides the rotary frequencies as no Llama 3 model does"):
        load_base(llama(tmp_path, tensors=tensors, metadata={"llama.rope.freq_base": 5e5}))


def with_rope(model, scaling, theta=10000.0):
    """The same weights with other rotary positions."""
    config = type(model.config).from_dict(
        {**model.config.to_dict(), "rope_parameters": {"rope_theta": theta, **scaling}}
    )
    changed = type(model)(config)
    changed.load_state_dict(model.state_dict())
    return changed.eval()


def test_takes_recommended_sampling(tmp_path):
    metadata = {"temp": 0.7, "top_k": 20, "penalty_repeat": 1.5, "mirostat": 0, "penalty_last_n": 64}
    path = llama(tmp_path, metadata={f"general.sampling.{key}": value for key, value in metadata.items()})
    config = load_base(path).generation_config
    received = (config.temperature, config.top_k, config.repetition_penalty, config.do_sample)
    assert received == pytest.approx((0.7, 20, 1.5, True))
    with pytest.raises(ModelError, match=r"general.sampling.mirostat recommends 2, which is not supported"):
        load_base(llama(tmp_path, metadata={"general.sampling.mirostat": 2}))
    assert not load_base(llama(tmp_path)).generation_config.do_sample


def test_ends_at_all_end_tokens(tmp_path):
    metadata = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}
    assert load_base(llama(tmp_path, metadata=metadata)).generation_config.eos_token_id == [2, 5, 6]


def test_is_saved_as_a_plain_checkpoint(tmp_path):
    """Its weights are plain numbers, though transformers marks the model as quantised."""
    model = load_base(llama(tmp_path))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_base(tmp_path / "saved")), logits(model))
