"""Images cut into tiles: pixels and tokens as the model's own processor makes them, whatever an image's size."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.tiny_models import TILE_IMAGE_TOKEN, TILE_TOKENS
from helpers.tiny_tokenizer import TILE_SPECIALS, make_tile_tokenizer
from helpers.vision import idefics3_processor, tile_processor
from PIL import Image
from tokenizers import AddedToken
from transformers import Idefics3Processor

from adalink.export.vision.image_processor import describe_processor
from adalink.runtime.errors import ModelError
from adalink.runtime.storage.vision_schema import tiles_of
from adalink.runtime.vision.preprocess import Preprocessor
from adalink.runtime.vision.tiles import Tiling
from adalink.training.models.tiles import read_tile_tokens, read_tiling

PROCESSORS = {
    "smolvlm": tile_processor,
    "idefics3": idefics3_processor,
    "of one row at most": lambda: tile_processor(tiles=1),
    "of odd tiles": lambda: tile_processor(edge=13, size={"longest_edge": 45}),
    "of an odd edge that one tile fills": lambda: tile_processor(edge=15, tiles=1),
    "not cut": lambda: tile_processor(do_image_splitting=False),
    "not cut and not resized first": lambda: tile_processor(do_image_splitting=False, do_resize=False),
    "not normalised": lambda: tile_processor(do_normalize=False),
    "not padded, bilinear": lambda: tile_processor(do_pad=False, resample=2),
}
LINES = [(1, 70), (97, 1), (70, 2), (300, 41)]
SIZES = [*LINES, (37, 53), (53, 37), (16, 16), (17, 16), (48, 48), (47, 49), (5, 5), (15, 15)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth in one half and noisy in the other, so that filters and edges show."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    smooth = np.add.outer(np.arange(height) * 3, np.arange(width) * 5)[..., None] + np.arange(3) * 40
    return np.where((np.arange(width) < width // 2)[:, None], smooth % 256, noise).astype(np.uint8)


def describe(processor: Any) -> Preprocessor:
    edge = processor.max_image_size["longest_edge"]
    return describe_processor(processor, (edge, edge), takes_tiles=True)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", SIZES)
def test_every_tile_is_the_processors(name: str, size: tuple[int, int]) -> None:
    processor, image = PROCESSORS[name](), picture(*size)
    steps = describe(processor)
    expected = processor(images=[Image.fromarray(image)], return_tensors="np", return_row_col_info=True)
    received = steps.apply(image)
    assert received.dtype == np.float32
    assert received.flags.c_contiguous
    np.testing.assert_allclose(received, np.asarray(expected["pixel_values"])[0], rtol=0, atol=1e-5)
    grid = (expected["rows"][0][0], expected["cols"][0][0])
    assert steps.grid(*size) == grid
    assert len(received) == tiles_of(grid)


def test_a_wrong_tile_is_found() -> None:
    """What the comparison above must be able to find."""
    image = picture(37, 53)
    right = describe(tile_processor()).apply(image)
    assert len(right) == 10
    wrong = {
        "columns before rows": right[[0, 3, 6, 1, 4, 7, 2, 5, 8, 9]],
        "the whole image first": np.roll(right, 1, axis=0),
        "another filter": describe(tile_processor(resample=3)).apply(image),
        "another mean": describe(tile_processor(image_mean=[0.5, 0.5, 0.49])).apply(image),
        "resized at once": describe(tile_processor()).apply(
            np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.LANCZOS))
        ),
    }
    for name, tiles in wrong.items():
        assert np.abs(tiles - right).max() > 1e-3, name


def test_no_image_has_more_rows_or_columns_than_its_tokens() -> None:
    rng = np.random.default_rng(0)
    for longest, edge in ((48, 16), (45, 15), (15, 15), (47, 13), (2048, 512), (1456, 364), (5000, 364)):
        tiling = Tiling(longest_edge=longest, edge=edge, is_cut=True)
        sizes = [*SIZES, (longest, longest), (1, 10**6), (10**6, 1), *rng.integers(1, 3000, (300, 2)).tolist()]
        grids = [tiling.grid(*size) for size in sizes]
        assert max(max(grid) for grid in grids) <= tiling.most
        assert all(grid == (0, 0) or min(grid) >= 1 for grid in grids)


def own_ids(text: str, images: list[np.ndarray], specials: tuple[str, ...]) -> list[int]:
    """What transformers' processor makes of a prompt."""
    processor = Idefics3Processor(idefics3_processor(), make_tile_tokenizer(specials), image_seq_len=TILE_TOKENS)
    images = [[Image.fromarray(image) for image in images]]
    return list(processor(text=[text], images=images)["input_ids"][0])


@pytest.mark.parametrize("specials", [TILE_SPECIALS, TILE_SPECIALS[:3]], ids=["tile tokens", "no tile tokens"])
@pytest.mark.parametrize("size", SIZES)
def test_tokens_around_tiles_are_the_processors(specials: tuple[str, ...], size: tuple[int, int]) -> None:
    tokenizer, tiling = make_tile_tokenizer(specials), read_tiling(idefics3_processor())
    tokens = read_tile_tokens(tokenizer, tiling, TILE_IMAGE_TOKEN, TILE_TOKENS)
    assert max(len(cell) for row in tokens.before_tile for cell in row) == (3 if specials == TILE_SPECIALS else 15)
    written = tokens.around([TILE_IMAGE_TOKEN] * TILE_TOKENS, tiling.grid(*size))
    before, after = (tokenizer(text)["input_ids"] for text in ("It is:\n", " what?"))
    assert own_ids("It is:\n<image> what?", [picture(*size)], specials) == [*before, *written, *after]


def test_tokens_of_an_image_that_is_one_tile() -> None:
    tokenizer, tiling = make_tile_tokenizer(), read_tiling(tile_processor(do_image_splitting=False))
    tokens = read_tile_tokens(tokenizer, tiling, TILE_IMAGE_TOKEN, TILE_TOKENS)
    assert tokens.before_tile == ()
    expected = tokenizer("<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>")
    assert tokens.around([TILE_IMAGE_TOKEN] * TILE_TOKENS, tiling.grid(50, 20)) == expected["input_ids"]


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (tile_processor(do_resize=False), "resizes to no size and cuts tiles of .*: expected do_resize"),
        (tile_processor(size={"height": 32, "width": 32}), "expected do_resize with a longest_edge"),
        (tile_processor(edge=20), r"gives images of \(20, 20\), the vision tower takes \(16, 16\): set its max_im"),
        (make_tile_tokenizer(), "image processor TokenizersBackend is not supported; expected one of Idefics3"),
    ],
)
def test_a_processor_that_does_not_fit_is_refused(processor: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        describe_processor(processor, (16, 16), takes_tiles=True)


def test_a_tokenizer_that_runs_placeholders_into_text_is_refused() -> None:
    tiling = read_tiling(tile_processor())
    without_fence = make_tile_tokenizer(TILE_SPECIALS[1:2])
    taking_spaces = make_tile_tokenizer((TILE_SPECIALS[0],))
    taking_spaces.add_tokens([AddedToken("<image>", special=True, rstrip=True)], special_tokens=True)
    for tokenizer in (without_fence, taking_spaces):
        with pytest.raises(ModelError, match=r"does not keep '<image>' and '<fake_.*' apart from the text around them"):
            read_tile_tokens(tokenizer, tiling, tokenizer.convert_tokens_to_ids("<image>"), TILE_TOKENS)
    with pytest.raises(ModelError, match=r"its tokenizer, .*, was not found: put it beside the checkpoint"):
        read_tile_tokens(None, tiling, TILE_IMAGE_TOKEN, TILE_TOKENS)


def test_the_steps_survive_their_file() -> None:
    steps = describe(tile_processor())
    assert msgspec.json.decode(msgspec.json.encode(steps), type=Preprocessor) == steps
