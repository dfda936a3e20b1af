"""Profiles: the shapes that a compiled engine takes, their text form, and checks of requests against them."""

from __future__ import annotations

import re

import msgspec

from adalink.runtime.errors import ConfigError, RequestError
from adalink.runtime.storage.manifest import Base

_RANGE = re.compile(r"(batch|seq|past|images)=(\d+):(\d+):(\d+)")
_LARGEST = 1 << 20
# A decode step's total length is rounded up to a multiple of this or more, so that steps share a captured graph.
_SMALLEST_STEP = 64


class ShapeRange(msgspec.Struct, frozen=True, array_like=True):
    """Smallest, likeliest and largest size of one dimension, as in a TensorRT optimization profile."""

    min: int
    opt: int
    max: int

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape ranges of one engine call.

    Attributes:
        batch: rows.
        seq: positions of a row in a prefill pass; a decoder takes a longer prompt in several passes.
        past: positions in the cache before a decode step; ``None`` for an encoder.
        images: images, or tiles of them, in a call of the vision tower; ``None`` where it is not compiled.
    """

    batch: ShapeRange
    seq: ShapeRange
    past: ShapeRange | None
    images: ShapeRange | None = None

    def __str__(self) -> str:
        ranges = {"batch": self.batch, "seq": self.seq, "past": self.past, "images": self.images}
        return ",".join(f"{name}={shape_range}" for name, shape_range in ranges.items() if shape_range is not None)

    @property
    def capacity(self) -> int:
        """Most positions of a row, cache and pass together."""
        return self.seq.max if self.past is None else self.past.max + 1

    @property
    def logits_capacity(self) -> int:
        """Most logits rows of one pass: the last position of each row, or all positions of one row."""
        return max(self.batch.max, self.seq.max)

    def check_batch(self, batch: int) -> None:
        """Check the number of rows; raises ``RequestError``."""
        if not self.batch.min <= batch <= self.batch.max:
            raise RequestError(
                f"inputs_embeds: {batch} rows, this engine takes {self.batch.min} to {self.batch.max}: send "
                f"fewer, or build it again with --profile batch={_widened(self.batch, batch)}"
            )

    def check_length(self, length: int) -> None:
        """Check the final length of a row; raises ``RequestError``."""
        if length > self.capacity:
            option, widened = ("seq", _widened(self.seq, length)) if self.past is None else ("past", None)
            if self.past is not None:
                widened = _widened(self.past, length - 1)
            raise RequestError(
                f"attention_mask: {length} positions, this engine takes 1 to {self.capacity}: shorten the prompt or "
                f"ask for fewer new tokens, or build it again with --profile {option}={widened}"
            )
        if self.past is None and length < self.seq.min:
            raise RequestError(
                f"inputs_embeds: {length} positions, this engine takes {self.seq.min} to {self.seq.max}: pad "
                f"the rows, or build it again with --profile seq={_widened(self.seq, length)}"
            )


def _widened(old: ShapeRange, size: int) -> ShapeRange:
    return ShapeRange(min(old.min, size), min(max(old.opt, old.min), size), max(old.max, size))


def default_profile(base: Base) -> Profile:
    """Default profile of a base: 8 rows, prefill passes of 512 positions, 4,096 positions in all.

    Image limits are those of ONNX Runtime; likeliest is one image, or the most tiles of a call.
    """
    limit = base.max_positions or _LARGEST
    if base.cache is None:
        return Profile(batch=ShapeRange(1, 8, 32), seq=ShapeRange(1, min(128, limit), min(512, limit)), past=None)
    seq = ShapeRange(1, min(128, limit), min(512, limit))
    past = ShapeRange(0, min(512, limit - 1), min(4095, limit - 1))
    images = None
    if base.vision is not None:
        most = base.vision.images_at_once
        images = ShapeRange(1, 1 if base.vision.tiles is None else most, most)
    return Profile(batch=ShapeRange(1, 1, 8), seq=seq, past=past, images=images)


def parse_profile(text: str, base: Base) -> Profile:
    """Parse a profile such as ``batch=1:4:8,seq=1:128:512,past=0:512:4095``.

    Missing entries come from ``default_profile``.

    Raises:
        ConfigError: the text has another form, or a size is out of the base's range.
    """
    profile = default_profile(base)
    ranges: dict[str, ShapeRange] = {}
    for entry in text.split(","):
        match = _RANGE.fullmatch(entry.strip())
        if match is None or match[1] in ranges:
            raise ConfigError(
                f"profile {text!r}: {entry!r} is not one of batch=, seq=, past= or images=, each once, with "
                "SMALLEST:LIKELIEST:LARGEST, as in batch=1:4:8,seq=1:128:512,past=0:512:4095"
            )
        ranges[match[1]] = ShapeRange(*(int(number) for number in match.groups()[1:]))
    if "past" in ranges and base.cache is None:
        raise ConfigError(f"profile {text!r}: {base.name} is an encoder and has no cache: leave past= out")
    profile = msgspec.structs.replace(profile, **ranges)
    check_profile(profile, base)
    return profile


def check_profile(profile: Profile, base: Base) -> None:
    """Check a profile's sizes; raises ``ConfigError``."""
    limit = base.max_positions or _LARGEST
    bounds = {
        "batch": (profile.batch, 1, 4096),
        "seq": (profile.seq, 1, limit),
        "past": (profile.past, 0, limit - 1),
        "images": (profile.images, 1, 4096),
    }
    for name, (shape_range, least, most) in bounds.items():
        if shape_range is not None and not least <= shape_range.min <= shape_range.opt <= shape_range.max <= most:
            raise ConfigError(f"profile: {name}={shape_range}, expected sizes in rising order from {least} to {most}")
    if profile.images is not None and base.vision is None:
        raise ConfigError(f"profile: images={profile.images}, but {base.name} takes no images: leave images= out")
    if profile.images is not None and profile.images.min > 1:
        raise ConfigError(f"profile: images={profile.images}, but an image may come alone: begin it at 1")
    if profile.past is None:
        return
    for name, shape_range, most in (("batch", profile.batch, 1), ("seq", profile.seq, 1), ("past", profile.past, 1)):
        if shape_range.min > most:
            raise ConfigError(
                f"profile: {name}={shape_range} begins at {shape_range.min}, but a decoder drops rows that have ended "
                f"and takes prompts in pieces: begin it at {most}"
            )
    if profile.past.max + 1 < profile.seq.max:
        raise ConfigError(
            f"profile: seq={profile.seq} takes more positions at a time than past={profile.past} leaves in the cache: "
            f"let past end at {profile.seq.max - 1} or more"
        )


def pieces(length: int, largest: int) -> list[tuple[int, int]]:
    """Start and stop of the prefill passes over ``length`` positions; the first pass is the shortest."""
    count = -(-length // largest)
    first = length - (count - 1) * largest
    return [(0, first)] + [(first + at * largest, first + (at + 1) * largest) for at in range(count - 1)]


def rounded_total(total: int, capacity: int) -> int:
    """Cache positions of a decode step, rounded up so that few captured graphs serve all lengths.

    At least ``total``, at most ``capacity``, and at most an eighth or 63 positions more than needed.
    """
    power = 1 << max(total - 1, 1).bit_length()
    step = max(_SMALLEST_STEP, power // 16)
    return min(-(-total // step) * step, capacity)
