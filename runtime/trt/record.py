"""Engine record ``engine.json``, beside a plan: source, target and build of a compiled engine."""

from __future__ import annotations

from pathlib import Path

import msgspec

from adalink.runtime.errors import DeploymentError
from adalink.runtime.profile import Profile
from adalink.runtime.storage.decoding import decode_json

RECORD_FILE = "engine.json"
PLAN_FILE = "engine.plan"
VISION_FILE = "vision.plan"


class VisionRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Record of the vision tower's plan, ``VISION_FILE`` beside the base's plan.

    Attributes:
        onnx_sha256: digest of the source vision graph, without its weights' file.
        weights_sha256: digest of that graph's weights' file.
        build_seconds: build time of the plan.
        plan_bytes: size of the plan.
    """

    onnx_sha256: str
    weights_sha256: str
    build_seconds: float
    plan_bytes: int


# The names on disk are those of 0.1.0.
_ON_DISK = {"embedders": "fronts", "embedder_rank": "front_rank", "embedder_slots": "front_slots"}


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=_ON_DISK):
    """Record of a compiled engine. Its plans are in the same folder.

    Attributes:
        backend: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        version: version of the library that built it; no other version loads it.
        target: compute capabilities such as ``"sm86"``, or ``"current"`` or ``"portable"``.
        variant: name of the source base variant.
        onnx_sha256: digest of that variant's graph, without its weights' file.
        weights_sha256: digest of its weights' file.
        profile: shapes that the engine takes.
        cache: ``"in-place"``, ``"growing"``, or ``None`` for an encoder.
        embedders: file name of each embedder's plan, by ``"<activation>.ids"`` and ``"<activation>.embeds"``.
        embedder_rank: largest rank that the embedders take.
        embedder_slots: most weight slots that the embedders take.
        tasks: file name of the plan of a task's own graph, by task.
        build_seconds: build time of the base's plan.
        plan_bytes: size of the base's plan.
        vision: record of the vision tower's plan; ``None`` for a text-only base, and in records of older kits.
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
        return decode_json(path.read_bytes(), EngineRecord)
    except (OSError, msgspec.DecodeError) as error:
        raise DeploymentError(f"{path}: {error}; build the engine again with 'adalink export engine'") from error
