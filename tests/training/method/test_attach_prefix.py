"""Attaching to PaliGemma, whose prompt attends in both directions: against the method, merge and mask written out."""

from __future__ import annotations

import pytest
import torch
from helpers.attach import MODALITIES, check_adapted, check_untouched, config, disturb, logits, residual
from helpers.tiny_models import HIDDEN_SIZE, IMAGE_SIZE, IMAGE_TOKENS, PREFIX_IMAGE_TOKEN, paligemma

from adalink.runtime.errors import ModelError
from adalink.training.adapter_io import load_adapter, save_adapter, to_adapter
from adalink.training.method.attach import attach

MASKED = -1e30


def request(images_a_row=(1, 2, 0), seed=3):
    """Rows of images, words and a completion, padded on the left to one length; each has its own length of prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows, prompts = [], []
    for number, count in enumerate(images_a_row):
        words = torch.randint(3, PREFIX_IMAGE_TOKEN, (7 + number,), generator=generator)
        rows.append(torch.cat([torch.full((count * IMAGE_TOKENS,), PREFIX_IMAGE_TOKEN), words]))
        prompts.append(len(rows[-1]) - 3)
    longest = max(map(len, rows))
    blanks = torch.tensor([longest - len(row) for row in rows])[:, None]
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    place = torch.arange(longest)[None]
    types = (place >= blanks + torch.tensor(prompts)[:, None]).long()
    pixels = torch.randn(sum(images_a_row), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": (place >= blanks).long(),
        "token_type_ids": types,
        "pixel_values": pixels,
    }


def by_hand(model, adapters, inputs):
    """Look up, encode, adapt each on its own, merge, and run the language model behind a mask made here."""
    ids, inner = inputs["input_ids"], model.model
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        text = table[ids] * HIDDEN_SIZE**0.5
        images = inner.multi_modal_projector(inner.vision_tower(inputs["pixel_values"]).last_hidden_state)
        text, images = (
            values if name not in adapters else values + residual(adapters[name], values)
            for name, values in (("text", text), ("image", images))
        )
        text[ids == PREFIX_IMAGE_TOKEN] = images.reshape(-1, images.shape[-1])
        real, is_prompt = inputs["attention_mask"].bool(), inputs["token_type_ids"] == 0
        place = torch.arange(ids.shape[1])
        seen = (place[None, :] <= place[:, None])[None] | (is_prompt[:, :, None] & is_prompt[:, None, :])
        mask = torch.where(seen & real[:, None, :], 0.0, MASKED)[:, None]
        states = inner.language_model(inputs_embeds=text, attention_mask=mask)
        return model.lm_head(states.last_hidden_state)


@pytest.mark.parametrize("modalities", MODALITIES)
def test_each_modality_has_its_own_adapter(modalities, tmp_path):
    model, inputs = paligemma(), request()
    attached, adapted = check_adapted(model, inputs, modalities, by_hand, atol=1e-4)
    save_adapter(tmp_path / "own", to_adapter(attached, "tiny"))
    real, expected = inputs["attention_mask"].bool(), by_hand(model, attached.adapters, inputs)
    causal = by_hand(model, attached.adapters, inputs | {"token_type_ids": torch.ones_like(inputs["input_ids"])})
    assert (causal - expected)[real].abs().max() > 0.05, "the mask written out must matter"
    with load_adapter(tmp_path / "own", model):
        assert torch.equal(logits(model, **inputs), adapted)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_modality_without_an_adapter_passes_bit_for_bit(modality):
    model = paligemma()
    check_untouched(model, request(), modality, model.model.language_model, PREFIX_IMAGE_TOKEN)


@pytest.mark.parametrize("scope", ["all", "prompt"])
def test_generation_adapts_the_prompt_whole_and_what_follows_as_the_scope_says(scope):
    model, inputs = paligemma(), request((1, 0))
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    model.generation_config.eos_token_id = None
    with attach(model, config(("text", "image"), scope=scope)) as attached:
        disturb(attached)
        made = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        prompt = inputs["input_ids"].shape[1]
        for length in range(prompt, made.shape[1]):
            follows = (torch.arange(length) >= prompt)[None].expand(2, -1)
            whole = inputs | {
                "input_ids": made[:, :length],
                "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, length - prompt), value=1),
                "token_type_ids": follows.long(),
            }
            with attached.positions(prompt_mask=~follows):
                assert torch.equal(made[:, length], logits(model, **whole)[:, -1].argmax(dim=-1))


def test_gradients_reach_both_adapters_and_nothing_else():
    model, inputs = paligemma(), request((1,))
    with attach(model, config(("text", "image"))) as attached:
        disturb(attached)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in attached.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_soft_prompt_is_refused():
    with pytest.raises(ModelError, match=r"PaliGemmaForConditionalGeneration decides in front .* use soft_tokens = 0"):
        attach(paligemma(), config(("text",), soft_tokens=2))
