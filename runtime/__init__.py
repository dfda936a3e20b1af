"""The edge side of AdaLink Kit: numpy and one engine, never torch, transformers or onnx."""

from adalink.runtime.deployment import Deployment
from adalink.runtime.generation.loop import Generation

__all__ = ["Deployment", "Generation"]
