"""Tile settings of an image processor, and the tokens around tiles from a tokenizer.

The texts are those of transformers' ``Idefics3Processor`` and ``SmolVLMProcessor``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adalink.runtime.errors import ModelError
from adalink.runtime.storage.vision_schema import Grid, TileTokens
from adalink.runtime.vision.tiles import Tiling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

PROCESSORS = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")


def processor_name(processor: BaseImageProcessor) -> str:
    """Name of an image processor's class, whatever its backend."""
    return type(processor).__name__.removesuffix("Fast").removesuffix("Pil")


def read_tiling(processor: BaseImageProcessor) -> Tiling:
    """How an image processor cuts images into tiles.

    Raises:
        ModelError: it is another kind of processor, or cuts images in a way that is not supported.
    """
    name = processor_name(processor)
    if name not in PROCESSORS:
        raise ModelError(f"image processor {name} is not supported; expected one of {', '.join(PROCESSORS)}")
    values = processor.to_dict()
    size, edge = dict(values["size"]), dict(values["max_image_size"]).get("longest_edge")
    longest = size.get("longest_edge") if values.get("do_resize") else None
    is_cut = bool(values.get("do_image_splitting"))
    if edge is None or (longest is None and (is_cut or values.get("do_resize"))):
        raise ModelError(
            f"image processor {name} resizes to {size if values.get('do_resize') else 'no size'} and cuts tiles of "
            f"{values['max_image_size']}: expected do_resize with a longest_edge in size, and one in max_image_size"
        )
    return Tiling(longest_edge=longest, edge=edge, is_cut=is_cut)


def read_tile_tokens(
    tokenizer: PreTrainedTokenizerBase | None, tiling: Tiling, image_token_id: int, tokens_per_tile: int
) -> TileTokens:
    """Tokens around the tiles of an image.

    Args:
        tokenizer: the model's tokenizer.
        tiling: how images are cut.
        image_token_id: the placeholder.
        tokens_per_tile: positions of a tile.

    Raises:
        ModelError: there is no tokenizer, or placeholders and the tokens around them are not special tokens.
    """
    if tokenizer is None:
        raise ModelError(
            "this model cuts images into tiles, and its tokenizer, which knows the tokens around them, was not found: "
            "put it beside the checkpoint, or pass tokenizer="
        )
    image = tokenizer.convert_ids_to_tokens(image_token_id)
    fence = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
    whole = getattr(tokenizer, "global_image_token", "<global-img>")

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    def before(row: int, column: int) -> str:
        return ("\n" if row and not column else "") + f"{fence}<row_{row + 1}_col_{column + 1}>"

    def text_of(grid: Grid) -> str:
        """The whole text of an image, to be tokenized at once."""
        rows, columns = grid
        run = image * tokens_per_tile
        tiles = "".join(before(row, column) + run for row in range(rows) for column in range(columns))
        return tiles + ("\n\n" if rows else "") + f"{fence}{whole}{run}{fence}"

    tokens = TileTokens(
        before_tile=tuple(
            tuple(encode(before(row, column)) for column in range(tiling.most)) for row in range(tiling.most)
        ),
        before_whole=encode(f"\n\n{fence}{whole}"),
        before_only=encode(f"{fence}{whole}"),
        end=encode(fence),
    )
    grids = ((0, 0), (tiling.most, tiling.most))
    placeholders = [image_token_id] * tokens_per_tile
    is_apart = {image, fence} <= tokenizer.get_added_vocab().keys() and all(
        tuple(tokens.around(placeholders, grid)) == encode(text_of(grid)) for grid in grids
    )
    if not is_apart:
        raise ModelError(
            f"the tokenizer does not keep {image!r} and {fence!r} apart from the text around them: both must be "
            "special tokens that take up no spaces; use the tokenizer that this model was trained with"
        )
    return tokens
