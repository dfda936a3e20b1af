"""Attaching to every class that takes images: an adapter acts on the embeddings of its modality and on nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import IMAGE_TOKEN, MAX_POSITIONS, llama, llava, paligemma, qwen2_5_vl
from helpers.vision_families import FAMILIES, PATCHES, config, disturb, extend, logits

from adalink.runtime.errors import ConfigError, ModelError, RequestError
from adalink.training.adapter_io import load_adapter, save_adapter, to_adapter
from adalink.training.method.attach import attach
from adalink.training.models.loading import base_fingerprint, load_base

MODALITIES = [("text",), ("image",), ("text", "image"), ("image", "text")]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("modalities", MODALITIES)
def test_adapted_logits_are_those_written_out(name, modalities, tmp_path):
    family = FAMILIES[name]
    model, inputs = family.make_model(), family.random_inputs()
    plain = logits(model, **inputs)
    with attach(model, config(modalities)) as attached:
        assert torch.equal(logits(model, **inputs), plain), "a fresh adapter is the identity"
        disturb(attached)
        adapted = logits(model, **inputs)
    real = inputs["attention_mask"].bool()
    expected = family.logits_by_hand(model, attached.adapters, inputs)
    torch.testing.assert_close(adapted[real], expected[real], rtol=0, atol=family.rounding)
    assert (adapted - plain)[real].abs().max() > 0.05
    assert torch.equal(logits(model, **inputs), plain), "detaching leaves a trace"
    save_adapter(tmp_path / "adapter", to_adapter(attached, "tiny"))
    with load_adapter(tmp_path / "adapter", model):
        assert torch.equal(logits(model, **inputs), adapted)


@pytest.mark.parametrize("modalities", MODALITIES)
def test_logits_written_out_show_a_prompt_that_is_causal(modalities):
    family = FAMILIES["paligemma"]
    model, inputs = family.make_model(), family.random_inputs()
    with attach(model, config(modalities)) as attached:
        disturb(attached)
    expected = family.logits_by_hand(model, attached.adapters, inputs)
    causal = inputs | {"token_type_ids": torch.ones_like(inputs["input_ids"])}
    wrong = family.logits_by_hand(model, attached.adapters, causal)
    assert (wrong - expected)[inputs["attention_mask"].bool()].abs().max() > 0.05, "the mask written out must matter"


@pytest.mark.parametrize("name", PATCHES)
def test_logits_written_out_show_an_image_on_its_side(name):
    """It has as many positions: only where it stands says which it is."""
    family: Any = FAMILIES[name]
    model, inputs = family.make_model(), family.random_inputs()
    turned = family.positions_by_hand(inputs, [family.GRIDS[0][::-1], *family.GRIDS[1:]])
    wrong = family.logits_by_hand(model, {}, inputs, position_ids=turned)
    assert (wrong - logits(model, **inputs))[0].abs().max() > 0.01


def test_each_modality_can_have_its_own_rank(tmp_path):
    family = FAMILIES["llava"]
    model, inputs = family.make_model(), family.random_inputs()
    with attach(model, config(("text", "image"), rank={"text": 2, "image": 7})) as attached:
        assert [attached.adapters[name].down.out_features for name in ("text", "image")] == [2, 7]
        disturb(attached)
        adapted = logits(model, **inputs)
        save_adapter(tmp_path / "adapter", to_adapter(attached, "tiny"))
    real, expected = inputs["attention_mask"].bool(), family.logits_by_hand(model, attached.adapters, inputs)
    torch.testing.assert_close(adapted[real], expected[real], rtol=0, atol=1e-5)
    with load_adapter(tmp_path / "adapter", model):
        assert torch.equal(logits(model, **inputs), adapted)
    with pytest.raises(ConfigError, match=r"rank is text=2,image=49 and the embeddings of Llava.* are 48 wide"):
        attach(model, config(("text", "image"), rank={"text": 2, "image": 49}))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("modality", ["text", "image"])
def test_modality_without_an_adapter_passes_bit_for_bit(name, modality):
    """What the language model is fed with at its positions."""
    family = FAMILIES[name]
    model, inputs, fed = family.make_model(), family.random_inputs(), []
    handle = family.language(model).register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    logits(model, **inputs)
    with attach(model, config((modality,))) as attached:
        disturb(attached)
        logits(model, **inputs)
    handle.remove()
    is_image = inputs["input_ids"] == family.image_token
    other = ~is_image if modality == "image" else is_image
    plain, adapted = fed
    assert torch.equal(adapted[other], plain[other])
    assert (adapted[~other] != plain[~other]).any(dim=-1).all()


@pytest.mark.parametrize("name", ["llava", "fast_vlm", "idefics3", "smolvlm"])
def test_model_without_images_is_adapted_as_its_language_model_alone(name):
    family = FAMILIES[name]
    model, inputs = family.make_model(), family.random_inputs((0, 0))
    inputs["input_ids"][0, -1] = family.image_token  # which nothing replaces
    with attach(model, config(("text", "image"))) as attached:
        disturb(attached)
        adapted = logits(model, **inputs)
        weights = {key: value.clone() for key, value in attached.adapters["text"].state_dict().items()}
    text = llama()
    text.model, text.lm_head = family.language(model), model.lm_head
    with attach(text, config(("text",))) as attached:
        attached.adapters["text"].load_state_dict(weights)
        assert torch.equal(logits(text, **inputs), adapted)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scope", ["all", "prompt"])
def test_generation_heeds_the_scope(name, scope):
    """Each token is that of the whole row at once: behind an image positions go on as its grid says."""
    family, settings = FAMILIES[name], config(("text", "image"), scope=scope)
    model, inputs = family.make_model(), family.random_inputs((1, 0) if name == "paligemma" else (1,))
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    model.generation_config.eos_token_id = None
    with attach(model, settings) as attached:
        disturb(attached)
        made = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    assert made.shape[1] == prompt + 6
    # Wider than the row: a mask may be.
    is_prompt = (torch.arange(MAX_POSITIONS) < prompt)[None].expand(len(made), -1)
    for length in range(prompt, made.shape[1]):
        with attach(model, settings) as again:
            again.adapters.load_state_dict(attached.adapters.state_dict())
            with again.positions(prompt_mask=is_prompt):
                expected = logits(model, **extend(inputs, made[:, prompt:length]))[:, -1].argmax(dim=-1)
        assert torch.equal(made[:, length], expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_both_adapters_and_nothing_else(name):
    family = FAMILIES[name]
    model, inputs = family.make_model(), family.random_inputs()
    with attach(model, config(("text", "image"))) as attached:
        disturb(attached)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in attached.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_placeholder_embedding_does_not_matter():
    model, inputs = llava(), FAMILIES["llava"].random_inputs()
    with attach(model, config(("text", "image"))) as attached:
        disturb(attached)
        before = logits(model, **inputs)
        with torch.no_grad():
            model.get_input_embeddings().weight[IMAGE_TOKEN] += 1.0
        assert torch.equal(logits(model, **inputs), before)


def test_embeddings_computed_by_the_caller_still_find_their_images():
    model, inputs = llava(), FAMILIES["llava"].random_inputs()
    with attach(model, config(("text", "image"))) as attached:
        disturb(attached)
        expected = logits(model, **inputs)
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        assert torch.equal(logits(model, inputs_embeds=embeds, **inputs), expected)


def test_modality_map_is_refused():
    model, inputs = llava(), FAMILIES["llava"].random_inputs((1,))
    ids = inputs["input_ids"]
    with (
        attach(model, config(("text", "image"))) as attached,
        attached.positions(modality=torch.zeros_like(ids)),
        pytest.raises(RequestError, match="knows its images by token 36: leave the map out"),
    ):
        model(**inputs)


def test_unknown_modality_is_refused():
    with pytest.raises(ModelError, match="has the modality 'sound': use the names 'text' and 'image'"):
        attach(llava(), config(("text", "sound")))


def test_other_class_is_refused_by_name():
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    tiny = llava().config
    other = LlavaOnevisionConfig(
        vision_config=tiny.vision_config, text_config=tiny.text_config, image_token_index=36, video_token_index=37
    )
    model = LlavaOnevisionForConditionalGeneration(other)
    with pytest.raises(ModelError, match=r"LlavaOnevisionForConditionalGeneration takes images in a way .*\('text',\)"):
        attach(model, config(("text", "image")))
    attach(model, config(("text",))).detach()


@pytest.mark.parametrize(
    ("make", "soft_tokens", "message"),
    [
        (paligemma, 2, r"PaliGemmaForConditionalGeneration decides in front .* use soft_tokens = 0"),
        (qwen2_5_vl, 3, "no soft prompt can stand before: use soft_tokens = 0"),
    ],
)
def test_soft_prompt_before_images_is_refused(make, soft_tokens, message):
    with pytest.raises(ModelError, match=message):
        attach(make(), config(("text",), soft_tokens=soft_tokens))


def test_videos_are_refused():
    model, inputs = qwen2_5_vl(), FAMILIES["qwen2_5_vl"].random_inputs()
    pixels, sizes = inputs.pop("pixel_values"), inputs.pop("image_grid_thw")
    with (
        attach(model, config(("text", "image"))),
        pytest.raises(RequestError, match="leave videos out, or give their frames as images"),
    ):
        logits(model, **inputs, pixel_values_videos=pixels, video_grid_thw=sizes)


def test_checkpoint_is_loaded_with_its_vision_tower_and_head(tmp_path):
    model, inputs = llava(), FAMILIES["llava"].random_inputs()
    model.save_pretrained(tmp_path)
    loaded = load_base(tmp_path)
    assert base_fingerprint(loaded) == base_fingerprint(model)
    assert torch.equal(logits(loaded, **inputs), logits(model, **inputs))
