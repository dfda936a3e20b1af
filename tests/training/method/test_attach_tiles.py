"""Attaching to models that take pictures as tiles: adapters behind the connector, and on text, and on nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers.attach import MODALITIES, check_adapted, check_untouched, config, disturb, logits, residual
from helpers.tiny_models import TILE_EDGE, TILE_IMAGE_TOKEN, TILE_TOKENS, TILE_VOCAB_SIZE, idefics3, llama, smolvlm

from adalink.training.method.attach import attach

MODELS = {"idefics3": idefics3, "smolvlm": smolvlm}


def request(tiles_a_row=(2, 3, 0), seed=3):
    """Rows of that many tiles, padded on the left; those of fewer are filled up with empty tiles, as processors do."""
    generator = torch.Generator().manual_seed(seed)
    longest, most = max(tiles_a_row) * TILE_TOKENS + 6, max(tiles_a_row)
    ids = torch.zeros(len(tiles_a_row), longest, dtype=torch.int64)
    mask, pixels = torch.zeros_like(ids), torch.zeros(len(tiles_a_row), most, 3, TILE_EDGE, TILE_EDGE)
    for row, tiles in enumerate(tiles_a_row):
        words = torch.randint(3, TILE_IMAGE_TOKEN, (6,), generator=generator)
        pieces = [words[:2], *[torch.full((TILE_TOKENS,), TILE_IMAGE_TOKEN)] * tiles, words[2:]]
        own = torch.cat(pieces)
        ids[row, longest - len(own) :], mask[row, longest - len(own) :] = own, 1
        pixels[row, :tiles] = torch.randn(tiles, 3, TILE_EDGE, TILE_EDGE, generator=generator)
    given = {} if most == 0 else {"pixel_values": pixels}
    return {"input_ids": ids, "attention_mask": mask, **given}


def by_hand(model, adapters, inputs):
    """The whole method written out: look up, encode the tiles that are not empty, adapt each on its own, merge, run."""
    ids, inner = inputs["input_ids"], model.model
    with torch.no_grad():
        text = model.get_input_embeddings()(ids)
        tiles = inputs["pixel_values"].flatten(0, 1)
        images = inner.connector(inner.vision_model(tiles[tiles.abs().sum(dim=(1, 2, 3)) > 0]).last_hidden_state)
        text, images = (
            values if name not in adapters else values + residual(adapters[name], values)
            for name, values in (("text", text), ("image", images))
        )
        merged = text.clone()
        merged[ids == TILE_IMAGE_TOKEN] = images.reshape(-1, images.shape[-1])
        states = inner.text_model(inputs_embeds=merged, attention_mask=inputs["attention_mask"])
        return model.lm_head(states.last_hidden_state)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("modalities", MODALITIES)
def test_each_modality_has_its_own_adapter(name, modalities):
    model, inputs = MODELS[name](), request()
    check_adapted(model, inputs, modalities, by_hand)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_modality_without_an_adapter_passes_bit_for_bit(modality):
    model = smolvlm()
    check_untouched(model, request(), modality, model.model.text_model, TILE_IMAGE_TOKEN)


def test_without_images_a_model_is_adapted_as_its_language_model_alone():
    model, inputs = idefics3(), request((0, 0))
    inputs["input_ids"][0, -1] = TILE_IMAGE_TOKEN  # which nothing replaces
    with attach(model, config(("text", "image"))) as attached:
        disturb(attached)
        adapted = logits(model, **inputs)
        own = {name: value.clone() for name, value in attached.adapters["text"].state_dict().items()}
    text = llama()
    text.model, text.lm_head = model.model.text_model, model.lm_head
    with attach(text, config(("text",))) as attached:
        attached.adapters["text"].load_state_dict(own)
        assert torch.equal(logits(text, **inputs), adapted)


@pytest.mark.parametrize("scope", ["all", "prompt"])
def test_generation_heeds_the_scope(scope):
    model, inputs = idefics3(), request((2,))
    model.generation_config.eos_token_id = None
    with attach(model, config(("text", "image"), scope=scope)) as attached:
        disturb(attached)
        made = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    for length in range(prompt, made.shape[1]):
        whole = {"input_ids": made[:, :length], "attention_mask": torch.ones(1, length, dtype=torch.int64)}
        with attach(model, config(("text", "image"), scope=scope)) as again:
            again.adapters.load_state_dict(attached.adapters.state_dict())
            with again.positions(prompt_mask=(torch.arange(TILE_VOCAB_SIZE) < prompt)[None]):
                expected = logits(model, **whole, pixel_values=inputs["pixel_values"])[0, -1].argmax()
        assert made[0, length] == expected


def test_gradients_reach_both_adapters_and_nothing_else():
    model, inputs = smolvlm(), request((1,))
    with attach(model, config(("text", "image"))) as attached:
        disturb(attached)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in attached.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())
