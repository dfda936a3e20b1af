"""Vision graph on ONNX Runtime's CPU provider, for every engine without a compiled vision tower."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from adalink.runtime.arrays import Array
from adalink.runtime.engine import VisionGraph
from adalink.runtime.errors import BackendUnavailableError, GraphError
from adalink.runtime.extras import install_command
from adalink.runtime.implements import implements
from adalink.runtime.ort.errors import guard, wrong_name
from adalink.runtime.ort.open_session import open_session
from adalink.runtime.storage.vision_base import VisionBase
from adalink.runtime.storage.vision_schema import VISION_INPUT, VISION_OUTPUT

if TYPE_CHECKING:
    import onnxruntime as ort


class OnnxVisionGraph:
    """See ``adalink.runtime.engine.VisionGraph``.

    Attributes:
        most_images: ``adalink.runtime.storage.manifest.Vision.images_at_once``.
    """

    def __init__(self, path: Path, base: VisionBase, threads: int | None = None) -> None:
        """Open the graph.

        Args:
            path: the ONNX file.
            base: the base, whose shapes the graph must have.
            threads: all physical cores by default.

        Raises:
            BackendUnavailableError: ONNX Runtime is not installed.
            BackendError: it cannot load the graph.
            GraphError: inputs or outputs are not those of a vision graph.
        """
        vision = base.vision
        self.most_images = vision.images_at_once
        self._origin = str(path)
        self._shape = (vision.tokens_per_image, base.contract.hidden_size)
        self._ort, self._session = open_vision_session(path, threads)
        for what, name, nodes in (
            ("input", VISION_INPUT, self._session.get_inputs()),
            ("output", VISION_OUTPUT, self._session.get_outputs()),
        ):
            if [node.name for node in nodes] != [name]:
                raise GraphError(wrong_name(self._origin, what, name, [node.name for node in nodes]))
        expected = [3, *vision.image_size]
        if (received := self._session.get_inputs()[0].shape[1:]) != expected:
            raise GraphError(
                f"{path}: {VISION_INPUT} is {received} an image, the manifest says {expected}: export it again"
            )

    @implements(VisionGraph)
    def run(self, pixel_values: Array) -> Array:
        embeds: Array = guard(
            self._ort, self._origin, lambda: self._session.run([VISION_OUTPUT], {VISION_INPUT: pixel_values})
        )[0]
        if embeds.shape[1:] != self._shape:
            raise GraphError(
                f"{self._origin}: {VISION_OUTPUT} is {embeds.shape[1:]} an image, the manifest says {self._shape}: "
                "export the base again"
            )
        return embeds

    def close(self) -> None:
        """See ``adalink.runtime.engine.VisionGraph``; memory is freed with the object."""


def open_vision_session(path: Path, threads: int | None) -> tuple[ModuleType, ort.InferenceSession]:
    """ONNX Runtime and a session of a vision graph; raises ``BackendUnavailableError`` or ``BackendError``."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendUnavailableError(
            f"the vision tower runs on ONNX Runtime, which is not installed: {install_command('cpu')}"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    # Spinning threads would take cores from the language model, which runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    origin = str(path)
    return onnxruntime, open_session(onnxruntime, origin, origin, options)
