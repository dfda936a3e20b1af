"""Image input: the caller's image as RGB pixels, by the rules of transformers' image processors.

- A file, as path or bytes: EXIF orientation is applied, an alpha channel is dropped.
- A Pillow image: used as it is, transparency on white.
- A uint8 array: grey, RGB, or RGBA on white; channels last, or first where the shape allows it.

Grey, palette, CMYK and 16-bit images become RGB as Pillow converts them.

Files are of the formats in ``FORMATS``. Pillow knows many more, some of which start other programs. A file is looked at
only if it is a regular one of at most ``MAX_FILE_BYTES``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from adalink.runtime.arrays import Array
from adalink.runtime.errors import BackendUnavailableError, RequestError
from adalink.runtime.extras import install_command
from adalink.runtime.storage.stamp import open_regular
from adalink.runtime.vision.preprocess import MAX_PIXELS

if TYPE_CHECKING:
    from PIL import Image

# A path, the bytes of a file, a Pillow image or a uint8 array.
ImageInput = Any

T = TypeVar("T")
# Formats of files, by Pillow's names. JPEG includes the MPO of some cameras, of which the first picture counts.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Four bytes for each of the most pixels: no file of these formats needs more.
MAX_FILE_BYTES = 4 * MAX_PIXELS
_CHANNELS = (1, 3, 4)


def read_image(source: ImageInput, name: str) -> Array:
    """RGB pixels of an image.

    Args:
        source: a path, the bytes of a file, a Pillow image or a uint8 array; not a URL.
        name: its name in errors, such as ``images[0][1]``.

    Returns:
        uint8 with shape ``(height, width, 3)``.

    Raises:
        RequestError: the source is missing, truncated, not an image, or large enough to exhaust the memory.
        BackendUnavailableError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise BackendUnavailableError(
            f"images need Pillow, which is not installed: {install_command('vision')}"
        ) from error
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Image.Image):
        _check_size(source.width, source.height, name)
        return _decoded(name, lambda: _on_white(source))
    if isinstance(source, (str, Path)):
        name = f"{name} ({source})"
        data = _read_bytes(Path(source), name)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        _check_bytes(memoryview(source).nbytes, name)
        data = bytes(source)
    else:
        raise RequestError(
            f"{name} is a {type(source).__name__}, expected a path, the bytes of a file, a Pillow image or a uint8 "
            "array"
        )
    return _from_file(data, name)


def _from_file(data: bytes, name: str) -> Array:
    from PIL import Image, ImageOps

    image = _decoded(name, lambda: Image.open(BytesIO(data), formats=FORMATS))
    with image:
        # Only the header has been read: the pixels are not in memory yet.
        _check_size(image.width, image.height, name)
        return _decoded(name, lambda: _on_white(ImageOps.exif_transpose(image).convert("RGB")))


def _read_bytes(path: Path, name: str) -> bytes:
    """Bytes of an image file, whose kind and size are checked before anything is read."""
    try:
        with open_regular(path) as stream:
            _check_bytes(os.fstat(stream.fileno()).st_size, name)
            data: bytes = stream.read(MAX_FILE_BYTES + 1) or b""
            while len(data) <= MAX_FILE_BYTES and (more := stream.read(MAX_FILE_BYTES + 1 - len(data))):
                data += more
    except (OSError, ValueError) as error:
        raise RequestError(f"{name} cannot be read: {error}; expected the path of an image file") from error
    _check_bytes(len(data), name)  # it may have grown
    return data


def _check_bytes(size_bytes: int, name: str) -> None:
    if size_bytes > MAX_FILE_BYTES:
        raise RequestError(f"{name} has {size_bytes} bytes, expected at most {MAX_FILE_BYTES}: make it smaller first")


def _on_white(image: Image.Image) -> Array:
    """RGB pixels of an image, transparency on white."""
    from PIL import Image

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def _decoded(name: str, decode: Callable[[], T]) -> T:
    """Call Pillow; any exception of its decoders means a damaged image."""
    try:
        return decode()
    # Decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and others, by format and damage.
    except Exception as error:
        raise RequestError(
            f"{name} is not an image that Pillow can read, or it is truncated: {type(error).__name__}: {error}; files "
            f"of {', '.join(FORMATS)} are read"
        ) from error


def _from_array(array: Array, name: str) -> Array:
    """Pixels of an array; the channel axis is found by the rules of transformers."""
    if array.dtype != np.uint8:
        raise RequestError(f"{name} is an array of {array.dtype}, expected uint8 with values from 0 to 255")
    shaped = array[..., None] if array.ndim == 2 else array
    if shaped.ndim == 3 and array.ndim == 3 and shaped.shape[0] in _CHANNELS:
        shaped = np.moveaxis(shaped, 0, -1)
    if shaped.ndim != 3 or shaped.shape[-1] not in _CHANNELS or 0 in shaped.shape:
        raise RequestError(
            f"{name} is an array of shape {array.shape}, expected (height, width) or (height, width, channels) with 1, "
            "3 or 4 channels"
        )
    _check_size(shaped.shape[1], shaped.shape[0], name)
    if shaped.shape[-1] == 4:
        alpha = shaped[..., 3:] / 255
        return np.round(alpha * shaped[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.repeat(shaped, 3, axis=-1) if shaped.shape[-1] == 1 else shaped)


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise RequestError(f"{name} has {width} x {height} pixels, expected at least one: give a picture with content")
    if width * height > MAX_PIXELS:
        raise RequestError(
            f"{name} has {width} x {height} pixels, expected at most {MAX_PIXELS} in all: a file that unpacks to so "
            "many may be meant to exhaust the memory; make it smaller first"
        )
