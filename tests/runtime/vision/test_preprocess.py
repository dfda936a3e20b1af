"""From an image to pixel values: what the model's own image processor gives, on every kind of image."""

from __future__ import annotations

import gc
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import transformers
from helpers.vision import clip_processor, llava_processor, siglip_processor
from PIL import Image

from adalink.export.vision.image_processor import describe_processor
from adalink.runtime.errors import BackendUnavailableError, IntegrityError, RequestError
from adalink.runtime.ort.session import is_older
from adalink.runtime.vision import images
from adalink.runtime.vision.images import read_image
from adalink.runtime.vision.preprocess import MAX_PIXELS, Preprocessor, read_preprocessor

# The last transformers for Python 3.10 refuses such images, or lays what is transparent on another ground.
AS_NOW = pytest.mark.skipif(
    is_older(transformers.__version__, "5.21"), reason="an older transformers reads it otherwise"
)
EDGE = 24
PROCESSORS: dict[str, Callable[[], Any]] = {
    "clip": clip_processor,
    "clip, bilinear": lambda: clip_processor(resample=2),
    "clip, resized beyond the crop": lambda: clip_processor(size={"shortest_edge": 31}),
    "clip, smaller than the crop": lambda: clip_processor(size={"shortest_edge": 17}),
    "clip, of both sides": lambda: clip_processor(size={"height": 40, "width": 27}),
    "clip, not resized": lambda: clip_processor(do_resize=False),
    "clip, not normalised": lambda: clip_processor(do_normalize=False),
    "clip, without a mean": lambda: clip_processor(do_normalize=False, image_mean=None, image_std=None),
    "clip, one mean for all channels": lambda: clip_processor(image_mean=0.4, image_std=0.3),
    "clip, not rescaled": lambda: clip_processor(do_rescale=False),
    "llava, padded to a square": llava_processor,
    "llava, padded without a mean": lambda: llava_processor(do_normalize=False, image_mean=None, image_std=None),
    "llava, not padded": lambda: llava_processor(do_pad=False),
    "siglip": siglip_processor,
}


def pixels(height: int, width: int, channels: int, seed: int = 0, top: int = 256) -> np.ndarray:
    """Smooth in one half and noisy in the other, so that filters and edges show."""
    rng = np.random.default_rng(seed)
    smooth = np.add.outer(np.arange(height) * 3, np.arange(width) * 5)[..., None] + np.arange(channels) * 40
    noise = rng.integers(0, top, (height, width, channels))
    noise[:, : width // 2] = (smooth % top)[:, : width // 2]
    return noise.astype(np.uint8 if top == 256 else np.uint16)


def picture(mode: str, height: int = 37, width: int = 53) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(pixels(height, width, 1, top=65536)[..., 0])
    if mode == "P with a transparent colour":
        image = Image.fromarray(pixels(height, width, 3)).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
        image.info["transparency"] = 3
        return image
    if mode == "RGB with a transparent colour":
        image = Image.fromarray(pixels(height, width, 3))
        image.info["transparency"] = image.getpixel((2, 2))
        return image
    if mode in ("1", "F", "I", "P", "LAB", "YCbCr", "HSV"):
        return Image.fromarray(pixels(height, width, 3)).convert("L" if mode in ("F", "I") else "RGB").convert(mode)
    array = pixels(height, width, {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode])
    return Image.fromarray(array[..., 0] if mode == "L" else array, mode=mode)


MODES = ["RGB", "L", "LA", "RGBA", "CMYK", "I;16", "1", "F", "I", "P", "YCbCr"]
TRANSPARENT = ["P with a transparent colour", "RGB with a transparent colour"]
ALL = [*MODES, *TRANSPARENT]
SEE_THROUGH = ("LA", "RGBA", "P with a transparent colour")
SIZES = [(37, 53), (53, 37), (24, 24), (1, 7), (7, 1), (25, 24), (300, 41)]


def describe(processor: Any) -> Preprocessor:
    return describe_processor(processor, (EDGE, EDGE))


def agrees(processor: Any, source: Any, reference: Any) -> np.ndarray:
    """What the kit makes of ``source``, compared with what the processor makes of ``reference``."""
    received = describe(processor).apply(read_image(source, "images[0][0]"))[0]
    expected = np.asarray(processor(images=reference, return_tensors="np")["pixel_values"][0])
    assert received.dtype == np.float32
    assert received.shape == expected.shape == (3, EDGE, EDGE)
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-5)
    return received


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", SIZES)
def test_every_step_at_odd_sizes(name: str, size: tuple[int, int]) -> None:
    if name == "siglip" and size == (1, 7):
        size = (2, 7)  # its processor takes (1, 7, 3) for channels first
    image = picture("RGB", *size)
    agrees(PROCESSORS[name](), image, image)


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=AS_NOW if mode in SEE_THROUGH else ()) for mode in ALL])
def test_a_pillow_image_of_every_mode(mode: str) -> None:
    image = picture(mode)
    before = image.tobytes()
    agrees(clip_processor(), image, image)
    assert image.tobytes() == before


FILES = [("RGB", "png"), ("RGB", "jpeg"), ("RGB", "webp"), ("RGB", "bmp"), ("RGB", "gif"), ("L", "png"), ("L", "jpeg")]
FILES += [("LA", "png"), ("RGBA", "png"), ("RGBA", "webp"), ("CMYK", "jpeg"), ("I;16", "png")]
FILES += [("1", "png"), ("P", "png"), ("RGB with a transparent colour", "png")]
FILES += [pytest.param("P with a transparent colour", "png", marks=AS_NOW)]


@pytest.mark.parametrize(("mode", "kind"), FILES)
def test_a_file_by_its_path_and_by_its_bytes(mode: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{kind}"
    picture(mode).save(path)
    received = agrees(clip_processor(), path, str(path))
    for source in (str(path), path.read_bytes(), bytearray(path.read_bytes())):
        np.testing.assert_array_equal(agrees(clip_processor(), source, str(path)), received)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_is_turned_as_its_exif_says_and_a_pillow_image_is_not(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    picture("RGB").save(path, exif=exif)
    turned = agrees(clip_processor(), path, str(path))
    with Image.open(path) as image:
        as_it_lies = agrees(clip_processor(), image, image)
    assert (np.abs(turned - as_it_lies).max() > 0.1) == (orientation != 1)


@pytest.mark.parametrize("shape", [(37, 53, 3), (3, 37, 53)])
def test_an_array_of_colours(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    agrees(clip_processor(), array, array)


@AS_NOW
@pytest.mark.parametrize("shape", [(37, 53, 4), (37, 53, 1), (4, 37, 53), (1, 37, 53)])
def test_an_array(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    agrees(clip_processor(), array, array)


@AS_NOW
def test_a_grey_array_without_channels() -> None:
    array = pixels(20, 30, 1)
    agrees(clip_processor(), array[..., 0], array)


def test_the_comparison_finds_an_image_that_is_slightly_off() -> None:
    image = picture("RGB")
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        agrees(clip_processor(), image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    for wrong in (
        clip_processor(resample=2),
        clip_processor(rescale_factor=1 / 256),
        clip_processor(image_mean=[0.5] * 3),
    ):
        received = describe(wrong).apply(read_image(image, ""))[0]
        expected = clip_processor()(images=image, return_tensors="np")["pixel_values"][0]
        assert np.abs(received - expected).max() > 1e-3


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def png(mode: str = "RGB") -> bytes:
    stream = BytesIO()
    picture(mode).save(stream, "png")
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "is not an image that Pillow can read, or it is truncated: UnidentifiedImageError"),
        (b"no picture at all", "is not an image that Pillow can read"),
        (png()[:20], "is not an image that Pillow can read, or it is truncated"),
        (png()[: len(png()) // 2], "is not an image that Pillow can read, or it is truncated: OSError"),
        (png_header(20000, 20000), "is not an image that Pillow can read.*DecompressionBombError"),
        (png_header(10000, 9000), f"has 10000 x 9000 pixels, expected at most {MAX_PIXELS}"),
        (Path("/nowhere/at/all.png"), r"\(/nowhere/at/all.png\) cannot be read: .*; expected the path of an image"),
        ("https://example.org/a.png", "cannot be read"),
        ("nul\0byte.png", "cannot be read"),
        (Path(__file__).parent, "cannot be read"),
        (7, "is a int, expected a path, the bytes of a file, a Pillow image or a uint8 array"),
        (np.zeros((4, 4, 3), np.float32), "is an array of float32, expected uint8"),
        (np.zeros((5, 5, 2), np.uint8), r"is an array of shape \(5, 5, 2\), expected \(height, width\)"),
        (np.zeros((4, 0, 3), np.uint8), r"is an array of shape \(4, 0, 3\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"is an array of shape \(2, 4, 4, 3\)"),
        (np.broadcast_to(np.uint8(0), (10000, 9000, 3)), "has 9000 x 10000 pixels"),
    ],
)
def test_what_is_no_image_is_refused_by_name(source: Any, message: str) -> None:
    with pytest.raises(RequestError, match=rf"^images\[2\]\[1\].*{message}"):
        read_image(source, "images[2][1]")


def test_a_truncated_pillow_image_is_refused() -> None:
    with Image.open(BytesIO(png()[: len(png()) // 2])) as image, pytest.raises(RequestError, match="truncated"):
        read_image(image, "images[0][0]")


@pytest.mark.parametrize("source", [b"", np.zeros((3, 3), np.uint8)])
def test_without_pillow_the_extra_is_named(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(BackendUnavailableError, match=r"images need Pillow.*pip install 'adalink-kit\[vision\]'"):
        read_image(source, "")


def test_a_narrow_image_does_not_become_a_bomb_by_resizing() -> None:
    steps = describe(clip_processor())
    with pytest.raises(RequestError, match="with its shorter edge resized to 24 it would have more than"):
        steps.apply(np.zeros((1, 200_000, 3), np.uint8))


@pytest.mark.parametrize("shape", [(1, 200_000, 3), (200_000, 1, 3)])
def test_a_narrow_image_does_not_become_a_bomb_by_padding(shape: tuple[int, ...]) -> None:
    steps = describe(llava_processor())
    with pytest.raises(RequestError, match="filled up to a square it would have more than"):
        steps.apply(np.zeros(shape, np.uint8))


def test_files_are_closed(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.png", tmp_path / "broken.png"
    whole.write_bytes(png())
    broken.write_bytes(png()[:300])
    gc.disable()
    try:
        before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
        read_image(whole, "")
        with pytest.raises(RequestError):
            read_image(broken, "")
        assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO"])
def test_documented_formats_are_read(format_name: str) -> None:
    stream = BytesIO()
    picture("RGB").save(stream, format_name, **({"lossless": True} if format_name == "WEBP" else {}))
    read = read_image(stream.getvalue(), "image")
    with Image.open(BytesIO(stream.getvalue())) as image:
        np.testing.assert_array_equal(read, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("format_name", ["EPS", "TIFF", "PPM", "PCX", "TGA", "ICO", "JPEG2000", "PDF"])
def test_other_formats_are_refused(format_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow starts Ghostscript for EPS."""
    stream = BytesIO()
    picture("RGB").save(stream, format_name)
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail(f"started {arguments}"))
    with pytest.raises(RequestError, match=r"is not an image that Pillow can read.*files of JPEG, PNG, WEBP, GIF, BMP"):
        read_image(stream.getvalue(), "image")


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    link = tmp_path / "link.png"
    link.symlink_to("/dev/zero")
    for path in (pipe, Path("/dev/zero"), Path("/dev/stdin"), link):
        if path.exists() and not path.is_file():
            with pytest.raises(RequestError, match="cannot be read"):
                read_image(path, "image")


def test_size_of_a_file_is_checked_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a hole, which takes no place on the disk."""
    path = tmp_path / "large.png"
    with path.open("wb") as stream:
        stream.truncate(images.MAX_FILE_BYTES + 1)
    monkeypatch.setattr(images, "BytesIO", lambda data: pytest.fail("it was read"))
    with pytest.raises(RequestError, match=rf"has {images.MAX_FILE_BYTES + 1} bytes, expected at most"):
        read_image(path, "image")
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 10)
    with pytest.raises(RequestError, match="has 11 bytes, expected at most 10"):
        read_image(bytes(11), "image")


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match=f"has {size[0]} x {size[1]} pixels, expected at least one"):
        read_image(Image.new("RGB", size), "image")


WHOLE: dict[str, Any] = {
    "pad_color": [1, 2, 3], "shortest_edge": 24, "resize": None, "resample": 3, "crop": [24, 24],
    "rescale_factor": 0.003, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
}  # fmt: skip
TILING = {"longest_edge": 48, "edge": 16, "is_cut": True}
PATCHING = {"least_pixels": 64, "most_pixels": 4096, "edge": 4, "merge": 2, "frames": 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pad_color", [0, 300, 0]),
        ("pad_color", [0, 0, -1]),
        ("shortest_edge", 0),
        ("shortest_edge", 10**6),
        ("resize", [-1, 24]),
        ("resize", [16384, 16384]),
        ("resample", 99),
        ("resample", -1),
        ("crop", [0, 24]),
        ("rescale_factor", 0.0),
        ("rescale_factor", -1.0),
        ("rescale_factor", 1e300),
        ("mean", [0.0, 1e300, 0.0]),
        ("std", [0.5, 0.0, 0.5]),
        ("std", [0.5, 0.5, -0.5]),
        ("std", [1e-300, 0.5, 0.5]),
        ("std", None),
        ("tiling", TILING | {"edge": 0}),
        ("tiling", TILING | {"longest_edge": -48}),
        ("patching", PATCHING | {"edge": 0}),
        ("patching", PATCHING | {"edge": 512}),
        ("patching", PATCHING | {"merge": -2}),
        ("patching", PATCHING | {"frames": 10**9}),
        ("patching", PATCHING | {"most_pixels": 10**12}),
        ("patching", PATCHING | {"least_pixels": 5000}),
    ],
)
def test_preprocessor_that_makes_no_sense_is_refused_by_its_field(field: str, value: Any) -> None:
    for whole in (WHOLE, WHOLE | {"tiling": TILING}, WHOLE | {"patching": PATCHING}):
        read_preprocessor(msgspec.json.encode(whole), "preprocessor.json")
    with pytest.raises(IntegrityError, match=rf"^preprocessor\.json: .*{field}.* (is|expected) "):
        read_preprocessor(msgspec.json.encode(WHOLE | {field: value}), "preprocessor.json")


@pytest.mark.parametrize("data", [b"", b"{}", b'{"pad_color": 3}', b"\xff"])
def test_a_damaged_preprocessor_is_named(data: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"preprocessor\.json is not a preprocessor: .*; export the base again"):
        read_preprocessor(data, "preprocessor.json")
