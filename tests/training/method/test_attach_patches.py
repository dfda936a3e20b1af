"""Attaching to models whose pictures keep their shape: adapters behind the merger, positions that follow the grid."""

from __future__ import annotations

import pytest
import torch
from helpers.attach import MODALITIES, check_adapted, check_untouched, config, disturb, logits, residual
from helpers.tiny_models import IMAGE_TOKEN, PATCH_EDGE, VOCAB_SIZE, qwen2_5_vl, qwen2_vl, qwen3_vl

from adalink.runtime.errors import ModelError, RequestError
from adalink.training.method.attach import attach

MODELS = {"qwen2": qwen2_vl, "qwen2.5": qwen2_5_vl, "qwen3": qwen3_vl}
# Rows and columns of pieces: of the pictures of each row.
GRIDS = (((3, 5),), ((2, 2), (4, 1)), ())


def request(grids=GRIDS, seed=3):
    """Rows of text with pictures of these grids between, padded on the left to one length."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for own in grids:
        words = torch.randint(3, VOCAB_SIZE - 1, (7,), generator=generator)
        words[words == IMAGE_TOKEN] = 4
        pieces = [words[:2]]
        for number, (high, wide) in enumerate(own):
            pieces += [torch.full((high * wide,), IMAGE_TOKEN), words[2 + number : 3 + number]]
        rows.append(torch.cat([*pieces, words[4:]]))
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    sizes = torch.tensor([[1, 2 * high, 2 * wide] for own in grids for high, wide in own])
    if len(sizes) == 0:
        return inputs
    pixels = torch.randn(int(sizes.prod(dim=1).sum()), 3 * 2 * PATCH_EDGE**2, generator=generator)
    types = (ids == IMAGE_TOKEN).int()
    return inputs | {"pixel_values": pixels, "image_grid_thw": sizes, "mm_token_type_ids": types}


def positions_by_hand(grids, ids, mask):
    """Shape ``(3, batch, seq)``, token by token."""
    result = torch.zeros(3, *ids.shape, dtype=torch.int64)
    for row, own in enumerate(grids):
        left, following, column = list(own), 0, int(mask[row].argmax())
        while column < ids.shape[1]:
            if ids[row, column] == IMAGE_TOKEN and left:
                high, wide = left.pop(0)
                for down in range(high):
                    for across in range(wide):
                        where = torch.tensor([following, following + down, following + across])
                        result[:, row, column + down * wide + across] = where
                column, following = column + high * wide, following + max(high, wide)
            else:
                result[:, row, column] = following
                column, following = column + 1, following + 1
    return result


def by_hand(model, adapters, inputs, grids=GRIDS):
    """The whole method written out: each picture through the tower alone, each modality adapted, merged and run."""
    ids, inner = inputs["input_ids"], model.model
    with torch.no_grad():
        text = model.get_input_embeddings()(ids)
        pixels = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(dim=1).tolist())
        seen = [inner.visual(own, size[None]) for own, size in zip(pixels, inputs["image_grid_thw"], strict=True)]
        images = torch.cat([own.pooler_output for own in seen])
        text, images = (
            values if name not in adapters else values + residual(adapters[name], values)
            for name, values in (("text", text), ("image", images))
        )
        merged, is_image = text.clone(), ids == IMAGE_TOKEN
        merged[is_image] = images
        more = {}
        if hasattr(seen[0], "deepstack_features"):
            deep = [torch.cat(own) for own in zip(*(own.deepstack_features for own in seen), strict=True)]
            more = {"visual_pos_masks": is_image, "deepstack_visual_embeds": deep}
        where = positions_by_hand(grids, ids, inputs["attention_mask"])
        states = inner.language_model(
            inputs_embeds=merged, attention_mask=inputs["attention_mask"], position_ids=where, **more
        )
        return model.lm_head(states.last_hidden_state)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("modalities", MODALITIES)
def test_each_modality_has_its_own_adapter(name, modalities):
    model, inputs = MODELS[name](), request()
    check_adapted(model, inputs, modalities, by_hand, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_tells_grids_of_one_size_apart(name):
    """A picture on its side has as many positions: only where it stands says which it is."""
    model, inputs = MODELS[name](), request()
    turned = by_hand(model, {}, inputs, (((5, 3),), *GRIDS[1:]))
    assert (turned - logits(model, **inputs))[0].abs().max() > 0.01


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_modality_without_an_adapter_passes_bit_for_bit(name, modality):
    model = MODELS[name]()
    check_untouched(model, request(), modality, model.model.language_model, IMAGE_TOKEN)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scope", ["all", "prompt"])
def test_generation_heeds_the_scope_and_goes_on_behind_the_picture(name, scope):
    model, inputs = MODELS[name](), request((((2, 4),),))
    model.generation_config.eos_token_id = None
    with attach(model, config(("text", "image"), scope=scope)) as attached:
        disturb(attached)
        made = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    for length in range(prompt, made.shape[1]):
        own = made[:, :length]
        types = (torch.arange(length) < prompt) & (own == IMAGE_TOKEN)
        whole = {"input_ids": own, "attention_mask": torch.ones_like(own), "mm_token_type_ids": types.int()}
        pictures = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
        with attach(model, config(("text", "image"), scope=scope)) as again:
            again.adapters.load_state_dict(attached.adapters.state_dict())
            with again.positions(prompt_mask=(torch.arange(length) < prompt)[None]):
                expected = logits(model, **whole, **pictures)[0, -1].argmax()
        assert made[0, length] == expected


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_both_adapters_and_nothing_else(name):
    model, inputs = MODELS[name](), request()
    with attach(model, config(("text", "image"))) as attached:
        disturb(attached)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in attached.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_videos_and_soft_prompts_are_refused():
    model, inputs = qwen2_5_vl(), request()
    with pytest.raises(ModelError, match="no soft prompt can stand before: use soft_tokens = 0"):
        attach(model, config(("text",), soft_tokens=3))
    pixels, sizes = inputs.pop("pixel_values"), inputs.pop("image_grid_thw")
    with (
        attach(model, config(("text", "image"))),
        pytest.raises(RequestError, match="leave videos out, or give their frames as images"),
    ):
        logits(model, **inputs, pixel_values_videos=pixels, video_grid_thw=sizes)
