"""A base that is known to take images."""

from __future__ import annotations

from dataclasses import dataclass

from adalink.runtime.errors import RequestError
from adalink.runtime.storage.manifest import Base, Vision


@dataclass(frozen=True)
class VisionBase:
    """A base that takes images.

    Attributes:
        contract: the base.
        vision: its image side, which is ``contract.vision``.
    """

    contract: Base
    vision: Vision


def vision_base(base: Base) -> VisionBase:
    """The base with its image side; raises ``RequestError`` for a base of text alone."""
    if base.vision is None:
        raise RequestError(f"{base.name} was exported without a vision tower: it has no images to encode")
    return VisionBase(base, base.vision)
