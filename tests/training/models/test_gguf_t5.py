"""GGUF files of T5: both forms of its layers, and of its head, are what the original computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.tiny_ggufs import write_gguf

from adalink.runtime.errors import ModelError
from adalink.training.models.loading import load_base, load_tokenizer

IDS = torch.tensor([[5, 17, 33, 60, 8, 91, 2, 40]])
START = torch.tensor([[0, 7, 9, 11]])


def original(proj, *, own_head):
    """T5 as its first release (relu, shared head) or as its later ones (gated, a head of its own)."""
    from transformers import T5Config, T5ForConditionalGeneration

    settings = {key: value for key, value in tiny_models.t5().config.to_dict().items() if key in SIZES}
    config = T5Config(**settings, feed_forward_proj=proj, tie_word_embeddings=not own_head)
    model = tiny_models._fill(T5ForConditionalGeneration(config), 9)
    if own_head:
        values = torch.randn(model.shared.weight.shape, generator=torch.Generator().manual_seed(3))
        model.lm_head.weight = torch.nn.Parameter(0.2 * values)
    return model


SIZES = ("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers", "decoder_start_token_id", "pad_token_id")


def logits(model):
    with torch.no_grad():
        return model.double()(input_ids=IDS, decoder_input_ids=START).logits


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("proj", ["relu", "gated-gelu"])
def test_equals_original_model(tmp_path, proj, own_head):
    model = original(proj, own_head=own_head)
    loaded = load_base(write_gguf(tmp_path / "tiny.gguf", model, "t5"))
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
    assert (loaded.config.feed_forward_proj, loaded.config.decoder_start_token_id) == (proj, 0)


def test_forms_differ():
    """Planted: transformers' own reading of a file, gated with the activation of the other form, and a scaled head."""
    gated = original("gated-gelu", own_head=True)
    right = logits(gated)
    for layer in (*gated.encoder.block, *gated.decoder.block):
        layer.layer[-1].DenseReluDense.act = torch.nn.ReLU()
    assert not torch.allclose(logits(gated), right, atol=1e-2)
    scaled = original("gated-gelu", own_head=True)
    scaled.config.scale_decoder_outputs = True
    assert not torch.allclose(logits(scaled), right, atol=1e-2)


def t5(path, **changes):
    return write_gguf(path / "tiny.gguf", original("gated-gelu", own_head=True), "t5", **changes)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"t5.attention.scale": 0.5}, r"t5.attention.scale would be dropped: it is 0.5, and the model is built with 1"),
        ({"t5.expert_count": 4}, r"t5.expert_count would be dropped"),
        ({"t5.rope.freq_base": 1e4}, r"t5.rope.freq_base would be dropped: the model has no rotary positions"),
        ({"t5.attention.relative_buckets_count": 16}, r"mismatched_sizes|and the metadata say"),
        ({"t5.decoder_block_count": 3}, r"say 3 layers and it holds tensors of 2"),
        ({"t5.attention.value_length": 8}, r"attention.value_length would be dropped"),
        ({"general.name": "umt5-small"}, r"it is a umt5 in the layout of T5, expected t5"),
    ],
    ids=str,
)
def test_refuses_other_settings(tmp_path, metadata, message):
    with pytest.raises(ModelError, match=message):
        load_base(t5(tmp_path, metadata=metadata))


def test_refuses_other_tensors(tmp_path):
    extra = np.ones((48, 48), np.float32)
    with pytest.raises(ModelError, match=r"1 of its 53 tensors would be dropped, the first 'dec.blk.0.attn_q.lora_a'"):
        load_base(t5(tmp_path, tensors={"dec.blk.0.attn_q.lora_a": extra}))
    with pytest.raises(ModelError, match=r"3 of its 4 layers have a tensor ffn_gate; expected all or none"):
        load_base(t5(tmp_path, tensors={"enc.blk.1.ffn_gate.weight": None}))
    embeddings = original("gated-gelu", own_head=True).shared.weight.detach().numpy()
    with pytest.raises(ModelError, match=r"'output.weight' holds the embeddings once more"):
        load_base(t5(tmp_path, tensors={"output.weight": 1.01 * embeddings}))


def test_takes_the_unused_bias_of_first_checkpoints(tmp_path):
    extra = {"dec.blk.0.cross_attn_rel_b.weight": np.ones((32, 4), np.float32)}
    assert torch.equal(logits(load_base(t5(tmp_path, tensors=extra))), logits(load_base(t5(tmp_path))))


# A vocabulary with two ways to spell most words; the last tokens are the ones that a converter fills it up with.
PIECES = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -2.0, "a": -3.0, "b": -3.5, "1": -4.0, "2": -4.0, "/": -4.2}
PIECES |= {"ab": -5.0, "▁ab": -5.5, "aba": -9.5, "▁a": -5.4, "1/2": -7.0, "▁1": -9.0}
TOKENS = [*PIECES, *(f"[PAD{index}]" for index in range(len(PIECES), tiny_models.VOCAB_SIZE))]


def charsmap(text, replacement):
    """A table of SentencePiece with one entry: a double array (darts-clone) of one path, then the replacement."""
    units, base, place = {0: 256 << 10}, 256, 0
    for number, byte in enumerate(text.encode()):
        place, base = base ^ byte, 256 * (number + 2)
        units[place] = byte | ((place ^ base) << 10)
    units[place] |= 1 << 8
    units[base] = 1 << 31
    array = np.zeros(max(units) + 1, "<u4")
    array[list(units)] = list(units.values())
    return [*np.array([array.nbytes], "<u4").tobytes(), *array.tobytes(), *replacement.encode(), 0]


def tokenizer_file(path, **metadata):
    changes = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.scores": [*PIECES.values(), *[-10000.0] * (len(TOKENS) - len(PIECES))],
        "tokenizer.ggml.token_type": [3, 3, 2, *[1] * (len(PIECES) - 3), *[5] * (len(TOKENS) - len(PIECES))],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": None,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.precompiled_charsmap": charsmap("½", "1/2"),
    }
    return t5(path, metadata=changes | metadata)


def best_pieces(text):
    """Unigram by its definition: of all ways to cut each word, the one whose scores sum to the most."""
    ids = []
    for word in text.replace("½", "1/2").split():
        word = f"▁{word}"
        best = [(0.0, ())] + [(-np.inf, ())] * len(word)
        for end in range(1, len(word) + 1):
            for start in range(end):
                score = PIECES.get(word[start:end], -np.inf if end - start > 1 else -100.0)
                candidate = (best[start][0] + score, (*best[start][1], word[start:end]))
                best[end] = max(best[end], candidate, key=lambda way: way[0])
        ids += [list(PIECES).index(piece) if piece in PIECES else 2 for piece in best[-1][1]]
    return [*ids, 1]


def test_tokens_of_file(tmp_path):
    loaded = load_tokenizer(tokenizer_file(tmp_path))
    for text in ("ab aba", "  ab\n\nab1/2 ", "½ab ½", "abaabba 12 1", "a/b", "ab z 1"):
        assert list(loaded(text)["input_ids"]) == best_pieces(text), text
    plain = load_tokenizer(tokenizer_file(tmp_path, **{"tokenizer.ggml.precompiled_charsmap": None}))
    assert list(plain("½")["input_ids"]) != best_pieces("½")  # as transformers reads the file
    assert loaded.convert_tokens_to_ids("<extra_id_99>") == len(PIECES)
    assert len(loaded) == len(TOKENS)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.add_space_prefix": False}, r"tokenizer.ggml.add_space_prefix is False, expected True"),
        ({"tokenizer.ggml.remove_extra_whitespaces": None}, r"remove_extra_whitespaces is None, expected True"),
        ({"tokenizer.ggml.unknown_token_id": 0}, r"tokenizer.ggml.unknown_token_id is 0, expected 2"),
        ({"tokenizer.ggml.add_bos_token": True}, r"tokenizer.ggml.add_bos_token is True, expected False"),
        ({"tokenizer.ggml.add_eos_token": False}, r"tokenizer.ggml.add_eos_token is False, expected True"),
        ({"tokenizer.ggml.token_type": [3, 3, 2, 6, *[1] * 92]}, r"has tokens of single bytes"),
        ({"tokenizer.ggml.eos_token_id": 4}, r"its end token is 4, expected the one of the text '</s>'"),
        ({"tokenizer.ggml.precompiled_charsmap": [1, 2, 3]}, r"precompiled_charsmap cannot be read"),
    ],
    ids=str,
)
def test_refuses_other_tokenizers(tmp_path, metadata, message):
    with pytest.raises(ModelError, match=message):
        load_tokenizer(tokenizer_file(tmp_path, **metadata))
