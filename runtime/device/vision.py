"""Compiled vision tower: pixel values to image embeddings, in device memory allocated once."""

from __future__ import annotations

import math

from adalink.runtime.arrays import Array
from adalink.runtime.device.protocols import Device, DeviceArena, Executor, Tensor
from adalink.runtime.device.workspace import VISION, Plans
from adalink.runtime.engine import VisionGraph
from adalink.runtime.errors import DeploymentError, GraphError
from adalink.runtime.implements import implements
from adalink.runtime.storage.vision_base import VisionBase
from adalink.runtime.storage.vision_schema import VISION_INPUT, VISION_OUTPUT


class DeviceVision:
    """See ``adalink.runtime.engine.VisionGraph``; its queue is separate from the engine's.

    Attributes:
        most_images: the profile's limit.
    """

    def __init__(self, device: Device, plans: Plans, base: VisionBase) -> None:
        """Open the tower of ``plans``, which it closes with itself.

        Raises:
            BackendError: the device has not enough memory, or refused.
            DeploymentError: the profile does not say how many images a call takes.
            GraphError: inputs or outputs are not those of the base's vision graph.
        """
        images = plans.profile.images
        if images is None:
            raise DeploymentError(
                f"the engine of {base.contract.name}: its profile has no images=: build the engine again"
            )
        self.most_images = images.max
        self._plans = plans
        self._image_shape, self._embeds_shape = (
            (3, *base.vision.image_size),
            (base.vision.tokens_per_image, base.contract.hidden_size),
        )
        self._arena = DeviceArena(device)
        try:
            self._executor = plans.executor(VISION, 0, self._arena)
            _check_signature(self._executor, self._image_shape, self._embeds_shape, base.contract.name)
            self._pixels = self._arena.pinned_buffer(images.max * math.prod(self._image_shape), "float32")
            self._embeds = self._arena.pinned_buffer(images.max * math.prod(self._embeds_shape), "float32")
        except BaseException:
            self._arena.close()
            raise

    @implements(VisionGraph)
    def run(self, pixel_values: Array) -> Array:
        input_shape, output_shape = (len(pixel_values), *self._image_shape), (len(pixel_values), *self._embeds_shape)
        queue = self._arena.queue
        self._pixels.host(*input_shape)[:] = pixel_values
        self._pixels.upload(queue, *input_shape)
        self._executor.bind(VISION_INPUT, self._pixels.address, input_shape)
        self._executor.bind(VISION_OUTPUT, self._embeds.address, output_shape)
        self._executor.enqueue()
        self._embeds.download(queue, *output_shape)
        queue.wait()
        return self._embeds.host(*output_shape).copy()

    @implements(VisionGraph)
    def close(self) -> None:
        self._executor.close()
        self._arena.close()
        self._plans.close()


def _check_signature(tower: Executor, input_shape: tuple[int, ...], output_shape: tuple[int, ...], name: str) -> None:
    """Check inputs and outputs of the graph against the manifest; raises ``GraphError``."""
    for what, tensors, tensor, shape in (
        ("input", tower.inputs, VISION_INPUT, input_shape),
        ("output", tower.outputs, VISION_OUTPUT, output_shape),
    ):
        expected = Tensor("float32", (-1, *shape))
        # An output size may be dynamic; it is bound to memory of the expected size.
        fits = {
            key: received.dtype == expected.dtype
            and len(received.shape) == len(expected.shape)
            and all(
                length in (-1, expected_length)
                for length, expected_length in zip(received.shape, expected.shape, strict=True)
            )
            for key, received in tensors.items()
        }
        if fits != {tensor: True}:
            raise GraphError(
                f"the vision tower of {name}: {what}s are {dict(tensors)}, expected {tensor} as {expected}: it was "
                "built from another graph; build the engine again"
            )
