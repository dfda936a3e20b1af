"""Attaching to a model that takes images: each modality's adapter acts on its own embeddings and on nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers.attach import MODALITIES, check_adapted, config, disturb, logits, residual
from helpers.tiny_models import IMAGE_SIZE, IMAGE_TOKEN, IMAGE_TOKENS, MAX_POSITIONS, VOCAB_SIZE, fast_vlm, llama, llava

from adalink.runtime.errors import ConfigError, ModelError, RequestError
from adalink.training.adapter_io import load_adapter, save_adapter, to_adapter
from adalink.training.method.attach import attach
from adalink.training.models.loading import base_fingerprint, load_base


def request(images_a_row=(1, 2, 0), seed=3):
    """Rows with one image, two and none, padded on the left to one length; images in the order of the rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for count in images_a_row:
        words = torch.randint(3, VOCAB_SIZE, (6,), generator=generator)
        words[words == IMAGE_TOKEN] = 4
        pieces = [words[:2]]
        for number in range(count):
            pieces += [torch.full((IMAGE_TOKENS,), IMAGE_TOKEN), words[2 + number : 3 + number]]
        rows.append(torch.cat([*pieces, words[4:]]))
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    pixels = torch.randn(sum(images_a_row), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def by_hand(model, adapters, inputs):
    """The whole method written out: look up, encode, adapt each on its own, merge, run the language model."""
    ids, llava_model = inputs["input_ids"], model.model
    with torch.no_grad():
        text = model.get_input_embeddings()(ids)
        tower = llava_model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
        is_map = model.config.model_type == "fast_vlm"
        seen = tower.last_hidden_state.flatten(2).mT if is_map else tower.hidden_states[-2][:, 1:]
        images = llava_model.multi_modal_projector(seen)
        text, images = (
            values if name not in adapters else values + residual(adapters[name], values)
            for name, values in (("text", text), ("image", images))
        )
        merged = text.clone()
        merged[ids == IMAGE_TOKEN] = images.reshape(-1, images.shape[-1])
        states = llava_model.language_model(inputs_embeds=merged, attention_mask=inputs["attention_mask"])
        return model.lm_head(states.last_hidden_state)


@pytest.mark.parametrize("make", [llava, fast_vlm])
@pytest.mark.parametrize("modalities", MODALITIES)
def test_each_modality_has_its_own_adapter(modalities, make):
    model, inputs = make(), request()
    check_adapted(model, inputs, modalities, by_hand)


def test_each_modality_can_have_its_own_rank(tmp_path):
    model, inputs = llava(), request()
    with attach(model, config(("text", "image"), rank={"text": 2, "image": 7})) as attached:
        assert [attached.adapters[name].down.out_features for name in ("text", "image")] == [2, 7]
        disturb(attached)
        adapted = logits(model, **inputs)
        save_adapter(tmp_path / "own", to_adapter(attached, "tiny"))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(adapted[real], by_hand(model, attached.adapters, inputs)[real], rtol=0, atol=1e-5)
    with load_adapter(tmp_path / "own", model):
        assert torch.equal(logits(model, **inputs), adapted)
    with pytest.raises(ConfigError, match=r"rank is text=2,image=49 and the embeddings of Llava.* are 48 wide"):
        attach(model, config(("text", "image"), rank={"text": 2, "image": 49}))


def merged_embeddings(model, inputs):
    """What the language model is fed with."""
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    logits(model, **inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_modality_without_an_adapter_passes_bit_for_bit(modality):
    model, inputs = llava(), request()
    is_image = inputs["input_ids"] == IMAGE_TOKEN
    other = ~is_image if modality == "image" else is_image
    plain = merged_embeddings(model, inputs)
    with attach(model, config((modality,))) as attached:
        disturb(attached)
        adapted = merged_embeddings(model, inputs)
    assert torch.equal(adapted[other], plain[other])
    assert (adapted[~other] != plain[~other]).any(dim=-1).all()


def test_without_images_a_model_is_adapted_as_its_language_model_alone():
    model = llava()
    inputs = request((0, 0))
    del inputs["pixel_values"]
    inputs["input_ids"][0, -1] = IMAGE_TOKEN  # which nothing replaces
    with attach(model, config(("text", "image"))) as attached:
        disturb(attached)
        adapted = logits(model, **inputs)
        own = {name: value.clone() for name, value in attached.adapters["text"].state_dict().items()}
    text = llama()
    text.model, text.lm_head = model.model.language_model, model.lm_head
    with attach(text, config(("text",))) as attached:
        attached.adapters["text"].load_state_dict(own)
        assert torch.equal(logits(text, **inputs), adapted)


def test_the_placeholders_own_embedding_does_not_matter():
    model, inputs = llava(), request()
    with attach(model, config(("text", "image"))) as attached:
        disturb(attached)
        before = logits(model, **inputs)
        with torch.no_grad():
            model.get_input_embeddings().weight[IMAGE_TOKEN] += 1.0
        assert torch.equal(logits(model, **inputs), before)


def test_embeddings_computed_by_the_caller_still_find_their_images():
    model, inputs = llava(), request()
    with attach(model, config(("text", "image"))) as attached:
        disturb(attached)
        expected = logits(model, **inputs)
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        assert torch.equal(logits(model, inputs_embeds=embeds, **inputs), expected)


@pytest.mark.parametrize("scope", ["all", "prompt"])
def test_generation_heeds_the_scope(scope):
    model, inputs = llava(), request((1,))
    model.generation_config.eos_token_id = None
    with attach(model, config(("text", "image"), scope=scope)) as attached:
        disturb(attached)
        made = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    for length in range(prompt, made.shape[1]):
        whole = {
            "input_ids": made[:, :length],
            "attention_mask": torch.ones(1, length, dtype=torch.int64),
            "pixel_values": inputs["pixel_values"],
        }
        with attach(model, config(("text", "image"), scope=scope)) as again:
            again.adapters.load_state_dict(attached.adapters.state_dict())
            in_prompt = (torch.arange(MAX_POSITIONS) < prompt)[None]
            with again.positions(prompt_mask=in_prompt):
                expected = logits(model, **whole)[0, -1].argmax()
        assert made[0, length] == expected


def test_gradients_reach_both_adapters_and_nothing_else():
    model, inputs = llava(), request((1,))
    with attach(model, config(("text", "image"))) as attached:
        disturb(attached)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in attached.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_modality_map_is_refused():
    model, inputs = llava(), request((1,))
    ids = inputs["input_ids"]
    with (
        attach(model, config(("text", "image"))) as attached,
        attached.positions(modality=torch.zeros_like(ids)),
        pytest.raises(RequestError, match="knows its images by token 36: leave the map out"),
    ):
        model(**inputs)


def test_an_unknown_modality_is_refused():
    with pytest.raises(ModelError, match="has the modality 'sound': use the names 'text' and 'image'"):
        attach(llava(), config(("text", "sound")))


def test_another_class_is_refused_by_name():
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    tiny = llava().config
    other = LlavaOnevisionConfig(
        vision_config=tiny.vision_config, text_config=tiny.text_config, image_token_index=36, video_token_index=37
    )
    model = LlavaOnevisionForConditionalGeneration(other)
    with pytest.raises(ModelError, match=r"LlavaOnevisionForConditionalGeneration takes images in a way .*\('text',\)"):
        attach(model, config(("text", "image")))
    attach(model, config(("text",))).detach()


def test_a_checkpoint_is_loaded_with_its_vision_tower_and_head(tmp_path):
    model, inputs = llava(), request()
    model.save_pretrained(tmp_path)
    loaded = load_base(tmp_path)
    assert base_fingerprint(loaded) == base_fingerprint(model)
    assert torch.equal(logits(loaded, **inputs), logits(model, **inputs))
