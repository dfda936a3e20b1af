"""Every kind of input by its name."""

from __future__ import annotations

from fuzz import deployment_kinds, folder_kinds, text_kinds
from fuzz.kind import KINDS, Kind, generator_of

__all__ = ["KINDS", "Kind", "generator_of"]

# Each of these modules registers its kinds.
_MODULES = (deployment_kinds, folder_kinds, text_kinds)
