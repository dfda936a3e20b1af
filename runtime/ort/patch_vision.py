"""Vision graph for images that keep their shape, on ONNX Runtime's CPU provider; one image in a call."""

from __future__ import annotations

from pathlib import Path

from adalink.runtime.arrays import Array
from adalink.runtime.engine import PatchVisionGraph
from adalink.runtime.errors import GraphError
from adalink.runtime.implements import implements
from adalink.runtime.ort.errors import guard, wrong_name
from adalink.runtime.ort.vision import open_vision_session
from adalink.runtime.storage.vision_base import VisionBase
from adalink.runtime.storage.vision_schema import VISION_INPUT, VISION_OUTPUT, Grid, PatchTower


class OnnxPatchGraph:
    """See ``adalink.runtime.engine.PatchVisionGraph``."""

    def __init__(self, path: Path, base: VisionBase, patches: PatchTower, threads: int | None = None) -> None:
        """Open the graph; ``patches`` is the base's, other arguments and errors are those of ``OnnxVisionGraph``."""
        self._origin, self._vision, self._tower = str(path), base.vision, patches
        self._width = base.contract.hidden_size
        self._ort, self._session = open_vision_session(path, threads)
        received = sorted(node.name for node in self._session.get_inputs())
        for name in (VISION_INPUT, *self._tower.inputs((1, 1))):
            if name not in received:
                raise GraphError(wrong_name(self._origin, "input", name, received))
        if [node.name for node in self._session.get_outputs()] != [VISION_OUTPUT]:
            outputs = [node.name for node in self._session.get_outputs()]
            raise GraphError(wrong_name(self._origin, "output", VISION_OUTPUT, outputs))

    @implements(PatchVisionGraph)
    def run(self, pixel_values: Array, grid: Grid) -> Array:
        feeds = {VISION_INPUT: pixel_values, **self._tower.inputs(grid)}
        embeds: Array = guard(self._ort, self._origin, lambda: self._session.run([VISION_OUTPUT], feeds))[0]
        expected = (self._vision.positions(grid), self._width)
        if embeds.shape != expected:
            raise GraphError(
                f"{self._origin}: {VISION_OUTPUT} is {embeds.shape} for an image of {grid}, expected {expected}: "
                "export the base again"
            )
        return embeds

    def close(self) -> None:
        """See ``adalink.runtime.engine.PatchVisionGraph``; memory is freed with the object."""
