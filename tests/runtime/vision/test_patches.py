"""Images as patches, and positions that follow their grid: as transformers computes each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import IMAGE_TOKEN, qwen2_5_vl
from helpers.vision import patch_processor
from helpers.vision_deployments import picture
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from adalink.export.vision.image_processor import describe_processor
from adalink.runtime.errors import RequestError
from adalink.runtime.generation.padding import positions_after
from adalink.runtime.storage.vision_schema import PatchTower
from adalink.runtime.vision.images import read_image
from adalink.runtime.vision.mrope import grid_positions

# Height and width: smaller than the least, larger than the most, odd, and almost lines.
SIZES = ((30, 41), (7, 9), (1, 150), (481, 320), (24, 24), (511, 23), (8, 8), (12, 12), (20, 28), (300, 2))
GRIDS = ((1, 1), (2, 2), (3, 5), (4, 4), (1, 7), (6, 3), (5, 2))


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_normalize": False}, {"do_rescale": False}, {"merge_size": 1}, {"patch_size": 5}, {"resample": 2}],
)
def test_pixel_values_are_those_of_the_models_own_processor(settings: dict[str, Any]) -> None:
    processor = patch_processor(**settings)
    edge = processor.patch_size * processor.merge_size
    steps = describe_processor(processor, (edge, edge), takes_patches=True)
    for seed, size in enumerate(SIZES):
        own = picture(seed, *size)
        expected = processor(images=own, return_tensors="np")
        received = steps.apply(read_image(own, "image"))
        assert received.dtype == np.float32
        assert received.shape == expected["pixel_values"].shape
        np.testing.assert_allclose(received, expected["pixel_values"], rtol=0, atol=1e-5)
        rows, columns = steps.grid(*size)
        merge = processor.merge_size
        assert [1, rows * merge, columns * merge] == expected["image_grid_thw"][0].tolist()


def test_an_image_too_narrow_is_refused_as_the_processor_does() -> None:
    steps = describe_processor(patch_processor(), (8, 8), takes_patches=True)
    line = np.zeros((3, 603, 3), np.uint8)
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        patch_processor()(images=line, return_tensors="np", input_data_format="channels_last")
    with pytest.raises(RequestError, match="the image is 603 x 3 pixels, expected the longer edge to be at most 200"):
        steps.apply(line)
    assert steps.apply(line[:, :600]).shape[1] == 3 * 2 * 16


@pytest.mark.parametrize(("merge", "window"), [(2, 2), (2, 3), (1, 2), (3, 4)])
def test_the_tower_sees_patches_where_transformers_puts_them(merge: int, window: int) -> None:
    for grid in GRIDS:
        sizes = torch.tensor([[1, merge * grid[0], merge * grid[1]]])
        inputs = PatchTower(merge=merge, window=window).inputs(grid)
        np.testing.assert_array_equal(inputs["patch_positions"], get_vision_position_ids(sizes, merge).numpy())
        order, ends = get_vision_window_index(sizes, merge, window * merge * 4, 4)
        patches = (order[:, None] * merge**2 + torch.arange(merge**2)).flatten()
        expected = [set(own.tolist()) for own in patches.split(ends.diff().tolist())]
        assert [set(own[own >= 0].tolist()) for own in inputs["window_patches"]] == expected
        assert inputs["window_patches"].shape[1] == (window * merge) ** 2
        flat = inputs["window_patches"].ravel()
        np.testing.assert_array_equal(flat[inputs["patch_places"]], np.arange(merge**2 * grid[0] * grid[1]))
    assert set(PatchTower(merge=merge, window=None).inputs((2, 3))) == {"patch_positions"}


def rows_with_images(seed: int) -> tuple[Any, Any, list[list[tuple[int, int]]]]:
    """Random rows, padded on either side, with up to three images each."""
    rng = np.random.default_rng(seed)
    rows, grids = [], []
    for _ in range(4):
        own = [GRIDS[index] for index in rng.integers(0, len(GRIDS), rng.integers(0, 4))]
        tokens = [5] * rng.integers(1, 3)
        for high, wide in own:
            tokens += [IMAGE_TOKEN] * (high * wide) + [6] * rng.integers(1, 4)
        rows.append(tokens)
        grids.append(own)
    longest = max(map(len, rows))
    ids, mask = np.zeros((2, 4, longest), np.int64)
    for row, tokens in enumerate(rows):
        start = 0 if rng.integers(2) else longest - len(tokens)
        ids[row, start : start + len(tokens)], mask[row, start : start + len(tokens)] = tokens, 1
    return ids, mask, grids


@pytest.mark.parametrize("seed", range(8))
def test_positions_are_those_of_transformers(seed: int) -> None:
    ids, mask, grids = rows_with_images(seed)
    tensor, given = torch.from_numpy(ids), torch.from_numpy(mask)
    sizes = torch.tensor([[1, 2 * high, 2 * wide] for own in grids for high, wide in own])
    expected, deltas = qwen2_5_vl().model.get_rope_index(
        tensor, (tensor == IMAGE_TOKEN).int(), image_grid_thw=sizes, attention_mask=given
    )
    received = grid_positions(ids, mask, grids, IMAGE_TOKEN)
    np.testing.assert_array_equal(received, expected.permute(1, 2, 0).numpy())
    after = positions_after(received)
    assert after.shape == (4, 1, 3)
    np.testing.assert_array_equal(after[:, 0, 0], (given.sum(dim=1) + deltas[:, 0]).numpy())


def test_without_images_all_axes_count_tokens() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    ids = np.full((2, 5), IMAGE_TOKEN)  # which nothing replaces
    for given in (ids, None):
        received = grid_positions(given, mask, [], IMAGE_TOKEN)
        assert received[0, :, 0].tolist() == [0, 0, 0, 1, 2]
        assert received[1, :, 2].tolist() == [0, 1, 2, 3, 0]
    assert positions_after(np.array([[0, 1, 2], [0, 1, 0]])).tolist() == [[3], [2]]


def test_images_without_a_token_between_are_two() -> None:
    received = grid_positions(np.full((1, 5), IMAGE_TOKEN), np.ones((1, 5)), [[(2, 1), (1, 3)]], IMAGE_TOKEN)
    assert received[0].tolist() == [[0, 0, 0], [0, 1, 0], [2, 2, 2], [2, 2, 3], [2, 2, 4]]


@pytest.mark.parametrize("columns", [[1, 2, 3, 5], [1, 2, 3]])
def test_placeholders_that_do_not_stand_together_are_refused(columns: list[int]) -> None:
    ids = np.full((1, 7), 5)
    ids[0, columns] = IMAGE_TOKEN
    with pytest.raises(RequestError, match="row 0: the placeholders of image 0 do not stand together, expected 4 in a"):
        grid_positions(ids, np.ones_like(ids), [[(2, 2)]], IMAGE_TOKEN)
