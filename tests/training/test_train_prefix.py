"""Training PaliGemma: the prompt in the form of its own processor, seen in both directions, and its loss by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import IMAGE_TOKENS, PREFIX_IMAGE_TOKEN, llava, paligemma
from helpers.tiny_tokenizer import make_prefix_tokenizer, make_tokenizer
from helpers.vision import siglip_processor
from PIL import Image
from transformers import PaliGemmaProcessor

from adalink.runtime.errors import DataError, ModelError
from adalink.training.data.images import TrainingImages
from adalink.training.data.rows import TrainingRow, encode_rows
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import load_base
from adalink.training.models.prefix_lm import prompt_form, prompt_inputs
from adalink.training.run import train
from adalink.training.settings import TrainSettings
from adalink.training.trainer import TrainableAdapters, collator
from studies.experiment.run import open_base

COLOURS = {"R": (220, 30, 40), "B": (20, 40, 230)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny-paligemma"
    paligemma().save_pretrained(folder)
    make_prefix_tokenizer().save_pretrained(folder)
    siglip_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, count in (("train", 24), ("eval", 12)):
        lines = []
        for index in range(count):
            letter = "RB"[int(rng.integers(2))]
            noisy = np.array(COLOURS[letter]) + rng.integers(-20, 20, (31, 27, 3))
            Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folder / f"{name}-{index}.png")
            lines.append({"prompt": "colour", "completion": letter, "images": [f"{name}-{index}.png"]})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def rows_of(data: Path, rows: list[TrainingRow], base: Path) -> tuple:
    model, tokenizer = load_base(base), make_prefix_tokenizer()
    pictures = TrainingImages(base, model, tokenizer)
    how = (pictures.tokens, prompt_form(model, tokenizer))
    return model, pictures, encode_rows(rows, tokenizer, 64, data / "rows.jsonl", *how)


def test_prompts_are_those_of_the_models_own_processor(base: Path, data: Path) -> None:
    reference_processor = siglip_processor()
    reference_processor.image_seq_length = IMAGE_TOKENS
    processor = PaliGemmaProcessor(reference_processor, make_prefix_tokenizer())
    names = [f"train-{index}.png" for index in range(3)]
    for prompt, count in (("caption en", 1), ("two?", 2), ("<image>a", 1), ("a<image>b <image>c\n", 2), ("\n", 1)):
        _, pictures, (example,) = rows_of(data, [TrainingRow(prompt, "X", tuple(names[:count]))], base)
        images = [Image.open(data / name) for name in names[:count]]
        expected = processor(images=[images], text=[prompt], return_tensors="pt")
        assert example.prompt == expected["input_ids"][0].tolist()
        assert (expected["token_type_ids"] == 0).all()
        joined = pictures.join({"input_ids": expected["input_ids"]}, [example])
        assert torch.equal(joined["pixel_values"], expected["pixel_values"])
    # The processor takes no prompt without an image: the same form, with none in front.
    _, _, (example,) = rows_of(data, [TrainingRow("no picture", "X")], base)
    assert example.prompt == make_prefix_tokenizer()("<bos>no picture\n", add_special_tokens=False)["input_ids"]


def test_loss_by_hand_over_rows_with_and_without_images(base: Path, data: Path) -> None:
    """Row by row, unpadded, with everything the prompt may see written out here."""
    rows = [
        TrainingRow("is", "RB", ("train-0.png",)),
        TrainingRow("no picture", "X"),
        TrainingRow("a", "B", ("train-1.png", "train-2.png")),
    ]
    model, pictures, examples = rows_of(data, rows, base)
    with attach(model, AdaLinkConfig(rank=4, modalities=("image", "text"))) as attached, torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in attached.adapters.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        batch = collator(model, make_prefix_tokenizer(), pictures)(examples)
        loss = TrainableAdapters(attached)(**batch)["loss"]
        text, image = attached.adapters["text"], attached.adapters["image"]
    total, count, inner = 0.0, 0, model.model
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example.prompt + example.target])
            embeds = text(model.get_input_embeddings()(ids))
            if example.images:
                pixels = siglip_processor()(images=[Image.open(p) for p in example.images], return_tensors="pt")
                states = inner.vision_tower(pixels["pixel_values"]).last_hidden_state
                embeds[ids == PREFIX_IMAGE_TOKEN] = image(inner.multi_modal_projector(states)).flatten(0, 1)
            place, prompt = torch.arange(ids.shape[1]), len(example.prompt)
            seen = (place[None] <= place[:, None]) | ((place[None] < prompt) & (place[:, None] < prompt))
            mask = torch.where(seen, 0.0, -1e30)[None, None]
            states = inner.language_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
            likely = model.lm_head(states)[0].log_softmax(dim=-1)
            for offset, token in enumerate(example.target):
                total -= float(likely[prompt - 1 + offset, token])
                count += 1
    assert float(loss) == pytest.approx(total / count, abs=1e-4)


def test_only_a_model_of_such_prompts_is_told_what_the_prompt_is() -> None:
    is_prompt = torch.tensor([[True, True, False]])
    assert prompt_inputs(llava(), is_prompt) == {}
    assert prompt_form(llava(), make_tokenizer()) is None
    assert prompt_inputs(paligemma(), is_prompt)["token_type_ids"].tolist() == [[0, 0, 1]]
    with pytest.raises(ModelError, match=r"expected token 98, the placeholder, twice, .* as PaliGemmaFor"):
        prompt_form(paligemma(), make_tokenizer())


def test_an_image_adapter_learns_what_the_picture_shows(base: Path, data: Path, tmp_path: Path) -> None:
    settings = TrainSettings(lr=2e-2, max_steps=60, batch_size=8, max_length=32, seed=3, device="cpu", save_steps=60)
    config = AdaLinkConfig(rank=32, activation="identity", modalities=("image",))
    report = train(base, data / "train.jsonl", data / "eval.jsonl", tmp_path / "adapter", config, settings)
    assert report["exact_match"]["adapter"] >= 0.9 > report["exact_match"]["base"] + 0.3


def test_more_placeholders_than_images_are_named(base: Path, data: Path) -> None:
    with pytest.raises(DataError, match=r"row 1 has 2 image placeholders \(token 98\) in its prompt and 1 images"):
        rows_of(data, [TrainingRow("<image><image>", "X", ("train-0.png",))], base)


def test_a_study_on_such_prompts_is_refused(base: Path) -> None:
    with pytest.raises(ModelError, match="PaliGemmaForConditionalGeneration attends to a prompt in both directions"):
        open_base(str(base))
