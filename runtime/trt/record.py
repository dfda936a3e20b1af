"""``engine.json``: what a compiled engine was built from, for what, and how; beside its plan."""

from __future__ import annotations

from pathlib import Path

import msgspec

from adalink.runtime.errors import NOT_JSON, DeploymentError
from adalink.runtime.profile import Profile

RECORD_FILE = "engine.json"
PLAN_FILE = "engine.plan"
VISION_FILE = "vision.plan"
CACHES = ("in-place", "growing")


class VisionRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the plan of a vision tower is, ``VISION_FILE`` beside the base's plan.

    Attributes:
        onnx_sha256: digest of the vision graph that it was built from, without its weights' file.
        weights_sha256: digest of that graph's weights' file.
        build_seconds: of the plan.
        plan_bytes: its size.
    """

    onnx_sha256: str
    weights_sha256: str
    build_seconds: float
    plan_bytes: int


# The names on disk are those of 0.1.0.
_ON_DISK = {"embedders": "fronts", "embedder_rank": "front_rank", "embedder_slots": "front_slots"}


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=_ON_DISK):
    """What a plan is. Plans of one record lie in one folder.

    Attributes:
        backend: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        version: of the library that built it; only the same one loads it.
        target: compute capabilities such as ``"sm86"``, or ``"current"`` or ``"portable"``.
        variant: name of the base variant it was built from.
        onnx_sha256: digest of that variant's graph, without its weights' file.
        weights_sha256: digest of its weights' file.
        profile: shapes it takes.
        cache: ``"in-place"``, ``"growing"``, or ``None`` for an encoder.
        embedders: file name of each embedder's plan, by ``"<activation>.ids"`` and ``"<activation>.embeds"``.
        embedder_rank: largest rank that the embedders take.
        embedder_slots: most sets of weights that the embedders take at a time.
        tasks: file name of the plan of a task's own graph, by task.
        build_seconds: of the base's plan.
        plan_bytes: size of the base's plan.
        vision: the plan of its vision tower; ``None`` for a base of text alone, and in records of older kits.
    """

    backend: str
    version: str
    target: tuple[str, ...]
    variant: str
    onnx_sha256: str
    weights_sha256: str
    profile: Profile
    cache: str | None
    embedders: dict[str, str]
    embedder_rank: int
    embedder_slots: int
    tasks: dict[str, str] = {}
    build_seconds: float
    plan_bytes: int
    vision: VisionRecord | None = None


def read_record(folder: Path) -> EngineRecord:
    """The record in an engine's folder; raises ``DeploymentError``."""
    path = folder / RECORD_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=EngineRecord)
    except (OSError, *NOT_JSON) as error:
        raise DeploymentError(f"{path}: {error}; build the engine again with 'adalink export engine'") from error
