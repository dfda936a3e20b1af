"""Training on rows with images: the loss of every class against its forward pass written out, and what it learns."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import IMAGE_TOKENS, TILE_TOKENS, llama, llava, paligemma
from helpers.tiny_tokenizer import make_prefix_tokenizer, make_tokenizer
from helpers.vision import patch_processor
from helpers.vision_deployments import write_rows
from helpers.vision_families import FAMILIES, PATCHES, TILES, config, disturb, extend
from PIL import Image

from adalink.runtime.errors import ConfigError, DataError, ModelError
from adalink.runtime.storage.adapter import read_adapter
from adalink.training.adapter_io import load_adapter
from adalink.training.data.batches import pad_decoder
from adalink.training.data.images import TrainingImages
from adalink.training.data.rows import TrainingRow, encode_rows, read_rows
from adalink.training.evaluation import exact_match
from adalink.training.loop.options import LoopOptions
from adalink.training.loop.trainer import TrainableAdapters, collator
from adalink.training.method.attach import attach
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import load_base
from adalink.training.models.patches import read_patching
from adalink.training.models.prefix_lm import prompt_form, prompt_inputs
from adalink.training.run import train
from adalink.training.settings import TrainSettings
from studies.experiment.run import open_base

SETTINGS = TrainSettings(lr=2e-2, max_steps=150, batch_size=8, max_length=32, seed=3, device="cpu", save_steps=20)
CONFIG = AdaLinkConfig(rank=32, activation="identity", modalities=("image",))
COLOURS = {"R": (220, 30, 40), "B": (20, 40, 230)}
# Height and width of images: of three, nine and six tiles and one each for the whole, and one smaller than any grid.
SIZES = ((11, 40), (30, 33), (60, 31), (17, 9))
# Of the rows of ``make_rows``: the positions of their images, and the first axes of the pixels of all.
EXPECTED = [
    *((name, [IMAGE_TOKENS, 0, 2 * IMAGE_TOKENS], (3,)) for name in ("llava", "fast_vlm", "paligemma")),
    *((name, [4 * TILE_TOKENS, 0, 17 * TILE_TOKENS], (1, 21)) for name in TILES),
    *((name, [5, 0, 22], (27 * 4,)) for name in PATCHES),
]


class Bases:
    """Checkpoints of the tiny models by name, written when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __getitem__(self, name: str) -> Path:
        folder = self._root / f"tiny-{name}"
        return folder if folder.exists() else FAMILIES[name].save(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes, one that is damaged and one that is almost a line."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder, (), SIZES)
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    Image.fromarray(np.zeros((3, 700, 3), np.uint8)).save(folder / "line.png")
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy images of two colours; every prompt is the same, so that only the image tells them apart."""
    folder, draw = tmp_path_factory.mktemp("colours"), random.Random(7)
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for split, count in (("train", 32), ("eval", 16)):
        rows = []
        for index in range(count):
            letter = draw.choice("RB")
            noise = rng.integers(-20, 20, (31, 27, 3))
            image = np.clip(np.array(COLOURS[letter]) + noise, 0, 255).astype(np.uint8)
            path = f"images/{split}-{index}.png"
            Image.fromarray(image).save(folder / path)
            rows.append({"prompt": "@ is", "completion": letter, "images": [path]})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / f"{split}-bare.jsonl").write_text("\n".join(json.dumps(row | {"prompt": "colour"}) for row in rows))
    return folder


def make_rows(name: str) -> list[TrainingRow]:
    """A row with one image, one with none and one with two."""
    mark = "" if name == "paligemma" else FAMILIES[name].placeholder  # its images go in front
    return [
        TrainingRow(prompt=f"{mark} is", completion="RB", images=("0.png",)),
        TrainingRow(prompt="no picture", completion="X"),
        TrainingRow(
            prompt=f"a {mark} and {mark}", completion="B", images=("1.png", "3.png" if name in PATCHES else "2.png")
        ),
    ]


def encode(base: Path, name: str, rows: list[TrainingRow], data: Path, max_length: int = 128) -> tuple[Any, ...]:
    model, tokenizer = load_base(base), FAMILIES[name].make_tokenizer()
    images = TrainingImages(base, model, tokenizer)
    form = prompt_form(model, tokenizer)
    return model, images, encode_rows(rows, tokenizer, max_length, data / "rows.jsonl", images.tokens, form)


@pytest.mark.parametrize(("name", "positions", "pixels"), EXPECTED)
def test_loss_of_a_batch_is_that_of_its_rows_alone(
    bases: Bases, data: Path, name: str, positions: list[int], pixels: tuple[int, ...]
) -> None:
    """Row by row, unpadded, as the model's own processor makes them: by the method written out, and by the model."""
    family, rows = FAMILIES[name], make_rows(name)
    model, images, examples = encode(bases[name], name, rows, data)
    assert [example.prompt.count(family.image_token) for example in examples] == positions
    alone = []
    for row, example in zip(rows, examples, strict=True):
        inputs = family.inputs(row.prompt, [Image.open(data / path) for path in row.images])
        assert inputs["input_ids"][0].tolist() == example.prompt
        alone.append(extend(inputs, torch.tensor([example.target])))

    def mean_loss(forward: Any) -> float:
        losses = []
        for example, inputs in zip(examples, alone, strict=True):
            likely = forward(inputs)[0].log_softmax(dim=-1)
            for place, token in enumerate(example.target):
                losses.append(-float(likely[len(example.prompt) - 1 + place, token]))
        return float(np.mean(losses))

    with attach(model, config(("image", "text"))) as attached, torch.no_grad():
        disturb(attached)
        batch = collator(model, family.make_tokenizer(), images)(examples)
        assert batch["pixel_values"].shape[: len(pixels)] == pixels
        loss = float(TrainableAdapters(attached)(**batch)["loss"])
        assert loss == pytest.approx(mean_loss(lambda inputs: model(**inputs).logits), abs=1e-4)
    by_hand = mean_loss(lambda inputs: family.logits_by_hand(model, attached.adapters, inputs))
    assert loss == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("name", PATCHES)
def test_batch_of_text_alone_keeps_its_positions(bases: Bases, data: Path, name: str) -> None:
    _, images, examples = encode(bases[name], name, make_rows(name)[1:2], data)
    batch = pad_decoder(examples, pad=2)
    assert images.join(batch, []) is batch


def test_paligemma_prompts_are_those_of_its_processor(bases: Bases, data: Path) -> None:
    family = FAMILIES["paligemma"]
    for prompt, count in (("caption en", 1), ("two?", 2), ("<image>a", 1), ("a<image>b <image>c\n", 2), ("\n", 1)):
        row = TrainingRow(prompt, "X", ("0.png", "1.png")[:count])
        _, images, (example,) = encode(bases["paligemma"], "paligemma", [row], data)
        expected = family.inputs(prompt, [Image.open(data / path) for path in row.images])
        assert example.prompt == expected["input_ids"][0].tolist()
        assert (expected["token_type_ids"] == 0).all()
        joined = images.join({"input_ids": expected["input_ids"]}, [example])
        assert torch.equal(joined["pixel_values"], expected["pixel_values"])
    # The processor takes no prompt without an image: the same form, with none in front.
    _, _, (example,) = encode(bases["paligemma"], "paligemma", [TrainingRow("no picture", "X")], data)
    assert example.prompt == make_prefix_tokenizer()("<bos>no picture\n", add_special_tokens=False)["input_ids"]


def test_prompt_is_told_to_a_model_of_such_prompts_alone() -> None:
    is_prompt = torch.tensor([[True, True, False]])
    assert prompt_inputs(llava(), is_prompt) == {}
    assert prompt_form(llava(), make_tokenizer()) is None
    assert prompt_inputs(paligemma(), is_prompt)["token_type_ids"].tolist() == [[0, 0, 1]]
    with pytest.raises(ModelError, match=r"expected token 98, the placeholder, twice, .* as PaliGemmaFor"):
        prompt_form(paligemma(), make_tokenizer())


def run(base: Path, data: Path, out: Path, config: AdaLinkConfig = CONFIG, **options: Any) -> dict[str, Any]:
    return train(base, data / "train.jsonl", data / "eval.jsonl", out, config, SETTINGS, loop=LoopOptions(**options))


@pytest.fixture(scope="module")
def finished(bases: Bases, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "adapter"
    return out, run(bases["llava"], colours, out)


def test_image_adapter_learns_what_the_image_shows(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    assert report["exact_match"]["adapter"] >= 0.9 > report["exact_match"]["base"] + 0.3
    assert report["loss_curve"][-1]["loss"] < report["loss_curve"][0]["loss"] / 2
    adapter = read_adapter(out)
    assert adapter.config.modalities == ("image",)
    assert set(adapter.weights) == {"image.down.weight", "image.up.weight"}
    assert report["images"]["train"] != report["images"]["eval"]


def test_image_adapter_of_paligemma_learns_what_the_image_shows(bases: Bases, colours: Path, tmp_path: Path) -> None:
    settings = TrainSettings(lr=2e-2, max_steps=60, batch_size=8, max_length=32, seed=3, device="cpu", save_steps=60)
    rows = (colours / "train-bare.jsonl", colours / "eval-bare.jsonl")
    report = train(bases["paligemma"], *rows, tmp_path / "adapter", CONFIG, settings)
    assert report["exact_match"]["adapter"] >= 0.9 > report["exact_match"]["base"] + 0.3


@pytest.mark.parametrize("name", ["idefics3", *PATCHES])
def test_adapters_of_both_modalities_are_trained_and_written(bases: Bases, tmp_path: Path, name: str) -> None:
    write_rows(tmp_path, make_rows(name), SIZES)
    settings = TrainSettings(lr=2e-2, max_steps=30, batch_size=3, max_length=128, device="cpu")
    ranks = AdaLinkConfig(rank={"image": 12, "text": 4}, modalities=("image", "text"))
    report = train(bases[name], *[tmp_path / "rows.jsonl"] * 2, tmp_path / "adapter", ranks, settings)
    assert report["loss_curve"][-1]["loss"] < report["loss_curve"][0]["loss"] / 2
    trained = read_adapter(tmp_path / "adapter").config
    assert (trained.modalities, trained.rank) == (ranks.modalities, ranks.rank)


def test_adapter_without_the_right_image_cannot_know(
    finished: tuple[Path, dict[str, Any]], bases: Bases, colours: Path
) -> None:
    """The control: each row with an image of the other colour is answered wrong."""
    tokenizer = make_tokenizer()
    model, images, examples = encode(bases["llava"], "llava", read_rows(colours / "eval.jsonl"), colours, 32)
    red = next(e.images for e in examples if tokenizer.decode(e.target[:1]) == "R")
    blue = next(e.images for e in examples if tokenizer.decode(e.target[:1]) == "B")
    exchanged = [type(e)(e.prompt, e.target, blue if tokenizer.decode(e.target[:1]) == "R" else red) for e in examples]
    with load_adapter(finished[0], model):
        assert exact_match(model, tokenizer, examples, 4, images) >= 0.9
        assert exact_match(model, tokenizer, exchanged, 4, images) <= 0.1


def test_resumed_run_gives_the_same_adapter_and_refuses_other_images(
    finished: tuple[Path, dict[str, Any]], bases: Bases, colours: Path, tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 25:
                raise KeyboardInterrupt

    copy = tmp_path / "data"
    (copy / "images").mkdir(parents=True)
    for path in colours.rglob("*.*"):
        (copy / path.relative_to(colours)).write_bytes(path.read_bytes())
    with pytest.raises(KeyboardInterrupt):
        run(bases["llava"], copy, tmp_path / "out", callbacks=[Interrupt()])
    kept = (copy / "images/train-0.png").read_bytes()
    (copy / "images/train-0.png").write_bytes((copy / "images/train-1.png").read_bytes())
    with pytest.raises(ConfigError, match="other images"):
        run(bases["llava"], copy, tmp_path / "out", resume=True)
    (copy / "images/train-0.png").write_bytes(kept)
    again = run(bases["llava"], copy, tmp_path / "out", resume=True)
    assert again["adapter_digest"] == finished[1]["adapter_digest"]


def test_trained_adapter_is_served_as_it_was_measured(
    finished: tuple[Path, dict[str, Any]], bases: Bases, colours: Path, tmp_path: Path
) -> None:
    """From the trained folder to a deployment: images by their paths, each answered as training measured it."""
    from adalink.export.adapter.export import export_adapter
    from adalink.export.base.export import export_base
    from adalink.runtime.deployment import Deployment

    export_base(bases["llava"], tmp_path / "deployment")
    export_adapter(finished[0], tmp_path / "deployment", name="colour")
    rows = read_rows(colours / "eval.jsonl")
    with Deployment.open(tmp_path / "deployment") as deployment:
        answers = deployment.generate(
            [row.prompt for row in rows],
            images=[[colours / name for name in row.images] for row in rows],
            tasks="colour",
            max_new_tokens=4,
        )
    right = sum(answer.text == row.completion for answer, row in zip(answers, rows, strict=True))
    assert right / len(rows) == finished[1]["exact_match"]["adapter"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"images": []}, r"train\.jsonl:1 has 1 image placeholders .token 36. in its prompt and 0 images"),
        ({"prompt": "no placeholder"}, r"train\.jsonl:1 has 0 image placeholders"),
        ({"prompt": "@@"}, r"train\.jsonl:1 has 2 image placeholders"),
        ({"images": ["nowhere.png"]}, r"train\.jsonl:1: image .*nowhere\.png is not there"),
        ({"images": "one.png"}, "Expected `array`"),
    ],
)
def test_rows_whose_images_do_not_fit_are_named(
    bases: Bases, colours: Path, tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    good = {"prompt": "@ is", "completion": "R", "images": [str(colours / "images/train-0.png")]}
    (tmp_path / "train.jsonl").write_text(json.dumps(good | row))
    (tmp_path / "eval.jsonl").write_text(json.dumps(good))
    with pytest.raises(DataError, match=words):
        run(bases["llava"], tmp_path, tmp_path / "out")
    assert not (tmp_path / "out.checkpoints").exists()


def test_damaged_image_is_named(bases: Bases, colours: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes((colours / "images/train-0.png").read_bytes()[:200])
    for name in ("train", "eval"):
        line = {"prompt": "@ is", "completion": "R", "images": ["bad.png"]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=r"bad\.png.* is not an image that Pillow can read, or it is truncated"):
        run(bases["llava"], tmp_path, tmp_path / "out")


def test_base_that_takes_no_images_says_so(bases: Bases, colours: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-llama"
    llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError, match="takes no images in a way that is supported"):
        run(folder, colours, tmp_path / "out")
    with pytest.raises(DataError, match="which this base or command does not take"):
        encode_rows(read_rows(colours / "eval.jsonl"), make_tokenizer(), 32, colours / "eval.jsonl")
    bare = tmp_path / "bare"
    llava().save_pretrained(bare)
    make_tokenizer().save_pretrained(bare)
    with pytest.raises(ModelError, match=r"expected preprocessor_config\.json"):
        run(bare, colours, tmp_path / "out")


LINE = TrainingRow(prompt="@", completion="B", images=("line.png",))
REFUSED = [
    ("idefics3", make_rows("idefics3")[2], 100, "row 1 has 119 tokens, expected at most 100"),
    ("idefics3", TrainingRow("<image>", "B", ("broken.png",)), 100, "broken.png.* is not an image"),
    ("idefics3", TrainingRow("<image>", "B"), 100, "row 1 has 1 image placeholders .* and 0 images"),
    (
        "paligemma",
        TrainingRow("<image><image>", "X", ("0.png",)),
        64,
        r"row 1 has 2 image placeholders \(token 98\) in its prompt and 1 images",
    ),
    *((name, make_rows(name)[2], 16, r"row 1 has \d+ tokens, expected at most 16") for name in PATCHES),
    *((name, LINE, 16, "line.png: the image is 700 x 3 pixels, expected the") for name in PATCHES),
    *(
        (name, TrainingRow("@@", "B", ("0.png",)), 16, r"row 1 has 2 image placeholders .* and 1 images")
        for name in PATCHES
    ),
]


@pytest.mark.parametrize(("name", "row", "max_length", "message"), REFUSED)
def test_row_that_cannot_be_encoded_is_named(
    bases: Bases, data: Path, name: str, row: TrainingRow, max_length: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        encode(bases[name], name, [row], data, max_length)


def test_videos_are_an_unknown_field(tmp_path: Path) -> None:
    (tmp_path / "videos.jsonl").write_text(json.dumps({"prompt": "@", "completion": "B", "videos": ["0.mp4"]}))
    with pytest.raises(DataError, match="videos"):
        read_rows(tmp_path / "videos.jsonl")


def test_processor_that_leaves_images_as_they_are_is_refused() -> None:
    with pytest.raises(ModelError, match="resizes to no size: expected do_resize with a shortest_edge"):
        read_patching(patch_processor(do_resize=False))


def test_study_on_prompts_in_both_directions_is_refused(bases: Bases) -> None:
    with pytest.raises(ModelError, match="PaliGemmaForConditionalGeneration attends to a prompt in both directions"):
        open_base(str(bases["paligemma"]))
