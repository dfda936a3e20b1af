"""A base with a vision section."""

from __future__ import annotations

from dataclasses import dataclass

from adalink.runtime.errors import RequestError
from adalink.runtime.storage.manifest import Base, Vision


@dataclass(frozen=True)
class VisionBase:
    """A base that takes images.

    Attributes:
        contract: the base.
        vision: its vision section, ``contract.vision``.
    """

    contract: Base
    vision: Vision


def vision_base(base: Base) -> VisionBase:
    """The base with its vision section; raises ``RequestError`` for a text-only base."""
    if base.vision is None:
        raise RequestError(f"{base.name} was exported without a vision tower: it has no images to encode")
    return VisionBase(base, base.vision)
