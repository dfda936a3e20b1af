"""Training on rows with images that are cut into tiles: prompts as the model's own processor writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import TILE_IMAGE_TOKEN, TILE_TOKENS, idefics3
from helpers.tiny_tokenizer import make_tile_tokenizer
from helpers.vision import idefics3_processor
from helpers.vision_deployments import write_rows
from PIL import Image
from transformers import Idefics3Processor

from adalink.runtime.errors import DataError
from adalink.runtime.storage.adapter import read_adapter
from adalink.training.data.images import TrainingImages
from adalink.training.data.rows import TrainingRow, encode_rows, pad_decoder
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import load_base
from adalink.training.run import TrainableAdapters, train
from adalink.training.settings import TrainSettings

ROWS = [
    TrainingRow(prompt="<image> is", completion="RB", images=("0.png",)),
    TrainingRow(prompt="no picture", completion="X"),
    TrainingRow(prompt="a <image> and <image>", completion="B", images=("1.png", "2.png")),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    for part in (idefics3(), make_tile_tokenizer(), idefics3_processor()):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three, of nine and of six tiles."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder, ROWS, ((11, 40), (30, 33), (60, 31)))
    return folder


def test_loss_by_hand_over_rows_with_and_without_images(base: Path, data: Path) -> None:
    """Row by row: tokens and pixels of transformers' own processor, connector, adapters and merge written out here."""
    model, tokenizer = load_base(base), make_tile_tokenizer()
    pictures = TrainingImages(base, model, tokenizer)
    examples = encode_rows(ROWS, tokenizer, 128, data / "rows.jsonl", pictures.tokens)
    assert [example.prompt.count(TILE_IMAGE_TOKEN) for example in examples] == [4 * TILE_TOKENS, 0, 17 * TILE_TOKENS]
    with attach(model, AdaLinkConfig(rank=4, modalities=("image", "text"))) as attached, torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in attached.adapters.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        batch = pictures.join(pad_decoder(examples, pad=2), examples)
        assert batch["pixel_values"].shape[:2] == (1, 21)
        loss = TrainableAdapters(attached)(**batch)["loss"]
        text, image = attached.adapters["text"], attached.adapters["image"]
    total, count = 0.0, 0
    processor = Idefics3Processor(idefics3_processor(), make_tile_tokenizer(), image_seq_len=TILE_TOKENS)
    with torch.no_grad():
        for row, example in zip(ROWS, examples, strict=True):
            own = [[Image.open(data / name) for name in row.images]] if row.images else None
            inputs = processor(text=[row.prompt], images=own, return_tensors="pt")
            assert inputs["input_ids"][0].tolist() == example.prompt
            ids = torch.tensor([example.prompt + example.target])
            embeds = text(model.get_input_embeddings()(ids))
            if row.images:
                states = model.model.vision_model(inputs["pixel_values"][0]).last_hidden_state
                embeds[0, ids[0] == TILE_IMAGE_TOKEN] = image(model.model.connector(states)).flatten(0, 1)
            likely = model.lm_head(model.model.text_model(inputs_embeds=embeds).last_hidden_state)[0].log_softmax(-1)
            for place, token in enumerate(example.target):
                total -= float(likely[len(example.prompt) - 1 + place, token])
                count += 1
    assert float(loss) == pytest.approx(total / count, abs=1e-4)


def test_an_adapter_is_trained_and_written(base: Path, data: Path, tmp_path: Path) -> None:
    settings = TrainSettings(lr=2e-2, max_steps=30, batch_size=3, max_length=128, device="cpu")
    config = AdaLinkConfig(rank={"image": 12, "text": 4}, modalities=("image", "text"))
    report = train(base, data / "rows.jsonl", data / "rows.jsonl", tmp_path / "adapter", config, settings)
    assert report["loss_curve"][-1]["loss"] < report["loss_curve"][0]["loss"] / 2
    trained = read_adapter(tmp_path / "adapter").config
    assert (trained.modalities, trained.rank) == (config.modalities, config.rank)


def test_a_row_that_cannot_be_used_is_named(base: Path, data: Path) -> None:
    model, tokenizer = load_base(base), make_tile_tokenizer()
    tokens = TrainingImages(base, model, tokenizer).tokens
    (data / "broken.png").write_bytes((data / "0.png").read_bytes()[:200])
    for row, message in (
        (ROWS[2], "row 1 has 119 tokens, expected at most 100"),
        (TrainingRow(prompt="<image>", completion="B", images=("broken.png",)), "broken.png.* is not an image"),
        (TrainingRow(prompt="<image>", completion="B"), "row 1 has 1 image placeholders .* and 0 images"),
    ):
        with pytest.raises(DataError, match=message):
            encode_rows([row], tokenizer, 100, data / "rows.jsonl", tokens)
