"""Training on rows with images: a tiny LLaVA learns to name what only the picture shows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import FAMILIES, IMAGE_TOKEN, IMAGE_TOKENS, llava
from helpers.tiny_tokenizer import make_tokenizer
from helpers.vision import clip_processor
from PIL import Image

from adalink.runtime.errors import ConfigError, DataError, ModelError
from adalink.runtime.storage.adapter import read_adapter
from adalink.training.data.images import TrainingImages
from adalink.training.data.rows import TrainingRow, encode_rows, pad_decoder, read_rows
from adalink.training.evaluation import exact_match
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import load_base
from adalink.training.run import train
from adalink.training.settings import LoopOptions, TrainSettings
from adalink.training.trainer import TrainableAdapters

SETTINGS = TrainSettings(lr=2e-2, max_steps=150, batch_size=8, max_length=32, seed=3, device="cpu", save_steps=20)
CONFIG = AdaLinkConfig(rank=32, activation="identity", modalities=("image",))
COLOURS = {"R": (220, 30, 40), "B": (20, 40, 230)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny-llava"
    llava().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    clip_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy pictures of two colours; every prompt is the same, so that only the picture tells them apart."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(7)
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for name, count in (("train", 32), ("eval", 16)):
        lines = []
        for index in range(count):
            letter = draw.choice("RB")
            noise = rng.integers(-20, 20, (31, 27, 3))
            picture = np.clip(np.array(COLOURS[letter]) + noise, 0, 255).astype(np.uint8)
            path = f"pictures/{name}-{index}.png"
            Image.fromarray(picture).save(folder / path)
            lines.append(json.dumps({"prompt": "@ is", "completion": letter, "images": [path]}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def run(base: Path, data: Path, out: Path, config: AdaLinkConfig = CONFIG, **options: Any) -> dict:
    return train(base, data / "train.jsonl", data / "eval.jsonl", out, config, SETTINGS, loop=LoopOptions(**options))


@pytest.fixture(scope="module")
def finished(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("out") / "adapter"
    return out, run(base, data, out)


def test_an_image_adapter_learns_what_the_picture_shows(finished: tuple[Path, dict]) -> None:
    out, report = finished
    assert report["exact_match"]["adapter"] >= 0.9 > report["exact_match"]["base"] + 0.3
    assert report["loss_curve"][-1]["loss"] < report["loss_curve"][0]["loss"] / 2
    adapter = read_adapter(out)
    assert adapter.config.modalities == ("image",)
    assert set(adapter.weights) == {"image.down.weight", "image.up.weight"}
    assert report["images"]["train"] != report["images"]["eval"]


def test_without_the_right_picture_it_cannot_know(finished: tuple[Path, dict], base: Path, data: Path) -> None:
    """The control: each row with a picture of the other colour is answered wrong."""
    from adalink.training.adapter_io import load_adapter

    model, tokenizer = load_base(base), make_tokenizer()
    pictures = TrainingImages(base, model, tokenizer)
    examples = encode_rows(read_rows(data / "eval.jsonl"), tokenizer, 32, data / "eval.jsonl", pictures.tokens)
    red = next(e.images for e in examples if tokenizer.decode(e.target[:1]) == "R")
    blue = next(e.images for e in examples if tokenizer.decode(e.target[:1]) == "B")
    exchanged = [type(e)(e.prompt, e.target, blue if tokenizer.decode(e.target[:1]) == "R" else red) for e in examples]
    with load_adapter(finished[0], model):
        assert exact_match(model, tokenizer, examples, 4, pictures) >= 0.9
        assert exact_match(model, tokenizer, exchanged, 4, pictures) <= 0.1


def test_loss_by_hand_over_rows_with_and_without_images(base: Path, data: Path) -> None:
    """Row by row, unpadded: tower, projector, adapters and merge written out here."""
    model, tokenizer = load_base(base), make_tokenizer()
    pictures = TrainingImages(base, model, tokenizer)
    names = [f"pictures/train-{index}.png" for index in range(3)]
    rows = [
        TrainingRow(prompt="@ is", completion="RB", images=(names[0],)),
        TrainingRow(prompt="no picture", completion="X"),
        TrainingRow(prompt="a @ and @", completion="B", images=(names[1], names[2])),
    ]
    examples = encode_rows(rows, tokenizer, 64, data / "rows.jsonl", pictures.tokens)
    assert examples[2].prompt.count(IMAGE_TOKEN) == 2 * IMAGE_TOKENS
    with attach(model, AdaLinkConfig(rank=4, modalities=("image", "text"))) as attached, torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in attached.adapters.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        batch = pictures.join(pad_decoder(examples, pad=2), examples)
        assert batch["pixel_values"].shape[0] == 3
        loss = TrainableAdapters(attached)(**batch)["loss"]
        text, image = attached.adapters["text"], attached.adapters["image"]
    total, count = 0.0, 0
    processor = clip_processor()
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example.prompt + example.target])
            embeds = text(model.get_input_embeddings()(ids))
            if example.images:
                values = processor(images=[Image.open(path) for path in example.images], return_tensors="pt")
                states = model.model.vision_tower(values["pixel_values"], output_hidden_states=True).hidden_states
                seen = image(model.model.multi_modal_projector(states[model.config.vision_feature_layer][:, 1:]))
                embeds[0, ids[0] == IMAGE_TOKEN] = seen.flatten(0, 1)
            logits = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
            likely = logits[0].log_softmax(dim=-1)
            for place, token in enumerate(example.target):
                total -= float(likely[len(example.prompt) - 1 + place, token])
                count += 1
    assert float(loss) == pytest.approx(total / count, abs=1e-4)


def test_the_same_run_gives_the_same_adapter_and_other_pictures_end_a_resumption(
    finished: tuple[Path, dict], base: Path, data: Path, tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 25:
                raise KeyboardInterrupt

    copy = tmp_path / "data"
    (copy / "pictures").mkdir(parents=True)
    for path in data.rglob("*.*"):
        (copy / path.relative_to(data)).write_bytes(path.read_bytes())
    with pytest.raises(KeyboardInterrupt):
        run(base, copy, tmp_path / "out", callbacks=[Interrupt()])
    kept = (copy / "pictures/train-0.png").read_bytes()
    (copy / "pictures/train-0.png").write_bytes((copy / "pictures/train-1.png").read_bytes())
    with pytest.raises(ConfigError, match="other images"):
        run(base, copy, tmp_path / "out", resume=True)
    (copy / "pictures/train-0.png").write_bytes(kept)
    again = run(base, copy, tmp_path / "out", resume=True)
    assert again["adapter_digest"] == finished[1]["adapter_digest"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"images": []}, r"row 1 has 1 image placeholders .token 36. in its prompt and 0 images"),
        ({"prompt": "no placeholder"}, "row 1 has 0 image placeholders"),
        ({"prompt": "@@"}, "row 1 has 2 image placeholders"),
        ({"images": ["nowhere.png"]}, r"row 1: image .*nowhere\.png is not there"),
        ({"images": "one.png"}, "Expected `array`"),
    ],
)
def test_rows_whose_images_do_not_fit_are_named(base: Path, data: Path, tmp_path: Path, row: dict, words: str) -> None:
    good = {"prompt": "@ is", "completion": "R", "images": [str(data / "pictures/train-0.png")]}
    (tmp_path / "train.jsonl").write_text(json.dumps(good | row))
    (tmp_path / "eval.jsonl").write_text(json.dumps(good))
    with pytest.raises(DataError, match=words):
        run(base, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out.checkpoints").exists()


def test_a_damaged_picture_is_named(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes((data / "pictures/train-0.png").read_bytes()[:200])
    for name in ("train", "eval"):
        line = {"prompt": "@ is", "completion": "R", "images": ["bad.png"]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=r"bad\.png.* is not an image that Pillow can read, or it is truncated"):
        run(base, tmp_path, tmp_path / "out")


def test_bases_that_take_no_images_say_so(base: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-llama"
    FAMILIES["llama"]().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError, match="takes no images in a way that is supported"):
        run(folder, data, tmp_path / "out")
    with pytest.raises(DataError, match="which this base or command does not take"):
        encode_rows(read_rows(data / "eval.jsonl"), make_tokenizer(), 32, data / "eval.jsonl")
    bare = tmp_path / "bare"
    llava().save_pretrained(bare)
    make_tokenizer().save_pretrained(bare)
    with pytest.raises(ModelError, match=r"expected preprocessor_config\.json"):
        run(bare, data, tmp_path / "out")


def test_what_was_trained_is_what_is_served(
    finished: tuple[Path, dict], base: Path, data: Path, tmp_path: Path
) -> None:
    """From the trained folder to a deployment: pictures by their paths, each answered as training measured it."""
    from adalink.export.adapter.export import export_adapter
    from adalink.export.base.export import export_base
    from adalink.runtime.deployment import Deployment

    export_base(base, tmp_path / "deployment")
    export_adapter(finished[0], tmp_path / "deployment", name="colour")
    rows = read_rows(data / "eval.jsonl")
    with Deployment.open(tmp_path / "deployment") as deployment:
        answers = deployment.generate(
            [row.prompt for row in rows],
            images=[[data / name for name in row.images] for row in rows],
            tasks="colour",
            max_new_tokens=4,
        )
    right = sum(answer.text == row.completion for answer, row in zip(answers, rows, strict=True))
    assert right / len(rows) == finished[1]["exact_match"]["adapter"]
