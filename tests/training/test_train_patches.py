"""Training on rows with images that keep their shape: prompts, patches and positions as the model's own processor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import IMAGE_TOKEN, qwen2_5_vl, qwen2_vl, qwen3_vl
from helpers.tiny_tokenizer import make_tokenizer
from helpers.vision import patch_processor
from helpers.vision_deployments import write_rows
from PIL import Image

from adalink.runtime.errors import DataError, ModelError
from adalink.runtime.storage.adapter import read_adapter
from adalink.training.data.images import TrainingImages
from adalink.training.data.rows import TrainingRow, encode_rows, pad_decoder, read_rows
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import load_base
from adalink.training.models.patches import read_patching
from adalink.training.run import TrainableAdapters, train
from adalink.training.settings import TrainSettings

ROWS = [
    TrainingRow(prompt="@ is", completion="RB", images=("0.png",)),
    TrainingRow(prompt="no picture", completion="X"),
    TrainingRow(prompt="a @ and @", completion="B", images=("1.png", "2.png")),
]


@pytest.fixture(scope="module", params=[qwen2_vl, qwen2_5_vl, qwen3_vl], ids=["qwen2", "qwen2.5", "qwen3"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    for part in (request.param(), make_tokenizer(), patch_processor()):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder, ROWS, ((11, 40), (30, 33), (17, 9)))
    return folder


def test_the_loss_of_a_batch_is_that_of_its_rows_alone(base: Path, data: Path) -> None:
    """Row by row with transformers' own counting of positions, and what its processor makes of each picture alone."""
    model, tokenizer, processor = load_base(base), make_tokenizer(), patch_processor()
    pictures = TrainingImages(base, model, tokenizer)
    examples = encode_rows(ROWS, tokenizer, 128, data / "rows.jsonl", pictures.tokens)
    with attach(model, AdaLinkConfig(rank=4, modalities=("image", "text"))) as attached, torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in attached.adapters.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        loss = TrainableAdapters(attached)(**pictures.join(pad_decoder(examples, pad=2), examples))["loss"]
        total, count = 0.0, 0
        for row, example in zip(ROWS, examples, strict=True):
            own = [processor(images=Image.open(data / name), return_tensors="pt") for name in row.images]
            wanted = [int(each["image_grid_thw"].prod()) // 4 for each in own]
            assert example.prompt.count(IMAGE_TOKEN) == sum(wanted)
            ids = torch.tensor([example.prompt + example.target])
            given = {key: torch.cat([each[key] for each in own]) for key in (own[0] if own else ())}
            types = {"mm_token_type_ids": (ids == IMAGE_TOKEN).int()} if own else {}
            likely = model(input_ids=ids, **given, **types).logits[0].log_softmax(-1)
            for place, token in enumerate(example.target):
                total -= float(likely[len(example.prompt) - 1 + place, token])
                count += 1
    assert float(loss) == pytest.approx(total / count, abs=1e-4)


def test_a_batch_of_text_alone_keeps_its_positions(base: Path, data: Path) -> None:
    model, tokenizer = load_base(base), make_tokenizer()
    pictures = TrainingImages(base, model, tokenizer)
    batch = pad_decoder(encode_rows(ROWS[1:2], tokenizer, 128, data / "rows.jsonl", pictures.tokens), pad=2)
    assert pictures.join(batch, []) is batch


def test_an_adapter_is_trained_and_written(base: Path, data: Path, tmp_path: Path) -> None:
    settings = TrainSettings(lr=2e-2, max_steps=30, batch_size=3, max_length=128, device="cpu")
    config = AdaLinkConfig(rank={"image": 12, "text": 4}, modalities=("image", "text"))
    report = train(base, data / "rows.jsonl", data / "rows.jsonl", tmp_path / "adapter", config, settings)
    assert report["loss_curve"][-1]["loss"] < report["loss_curve"][0]["loss"] / 2
    trained = read_adapter(tmp_path / "adapter").config
    assert (trained.modalities, trained.rank) == (config.modalities, config.rank)


def test_a_row_that_cannot_be_used_is_named(base: Path, data: Path) -> None:
    model, tokenizer = load_base(base), make_tokenizer()
    tokens = TrainingImages(base, model, tokenizer).tokens
    Image.fromarray(np.zeros((3, 700, 3), np.uint8)).save(data / "line.png")
    for row, message in (
        (ROWS[2], r"row 1 has \d+ tokens, expected at most 16"),
        (
            TrainingRow(prompt="@", completion="B", images=("line.png",)),
            r"line.png: the image is 700 x 3 pixels, expected the",
        ),
        (TrainingRow(prompt="@@", completion="B", images=("0.png",)), "row 1 has 2 image placeholders .* and 1 images"),
    ):
        with pytest.raises(DataError, match=message):
            encode_rows([row], tokenizer, 16, data / "rows.jsonl", tokens)
    (data / "videos.jsonl").write_text(json.dumps({"prompt": "@", "completion": "B", "videos": ["0.mp4"]}))
    with pytest.raises(DataError, match="unknown field `videos`"):
        read_rows(data / "videos.jsonl")


def test_processors_that_leave_pictures_as_they_are_are_refused() -> None:
    with pytest.raises(ModelError, match="resizes to no size: expected do_resize with a shortest_edge"):
        read_patching(patch_processor(do_resize=False))
