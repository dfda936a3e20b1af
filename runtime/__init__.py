"""The edge side of AdaLink Kit: numpy and one engine, never torch, transformers or onnx."""

from typing import TYPE_CHECKING

from adalink.runtime.errors import (
    AdaLinkError,
    AdapterError,
    BackendError,
    BackendUnavailableError,
    BusyError,
    ConfigError,
    ContractError,
    DataError,
    DeploymentError,
    GraphError,
    IntegrityError,
    ManifestError,
    ModelError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
    UnknownTaskError,
    WriteError,
)
from adalink.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from adalink.runtime.deployment import Deployment
    from adalink.runtime.generation.handle import Handle, TextPiece
    from adalink.runtime.generation.request import Request
    from adalink.runtime.generation.sequence import Generation
    from adalink.runtime.receipt import Receipt
    from adalink.runtime.sampling.sampler import SamplingParams
    from adalink.runtime.sampling.structured_output import StructuredOutput
    from adalink.runtime.tasks.task_changes import Reload
    from adalink.runtime.text.messages import ChatOptions
    from adalink.runtime.text.spans import Span
    from adalink.runtime.text_classifier import Classification
else:
    __getattr__, __dir__ = lazy_exports(
        __name__,
        {
            "ChatOptions": "adalink.runtime.text.messages",
            "Classification": "adalink.runtime.text_classifier",
            "Deployment": "adalink.runtime.deployment",
            "Generation": "adalink.runtime.generation.sequence",
            "Handle": "adalink.runtime.generation.handle",
            "Receipt": "adalink.runtime.receipt",
            "Reload": "adalink.runtime.tasks.task_changes",
            "Request": "adalink.runtime.generation.request",
            "SamplingParams": "adalink.runtime.sampling.sampler",
            "Span": "adalink.runtime.text.spans",
            "StructuredOutput": "adalink.runtime.sampling.structured_output",
            "TextPiece": "adalink.runtime.generation.handle",
        },
    )

__all__ = [
    "AdaLinkError",
    "AdapterError",
    "BackendError",
    "BackendUnavailableError",
    "BusyError",
    "ChatOptions",
    "Classification",
    "ConfigError",
    "ContractError",
    "DataError",
    "Deployment",
    "DeploymentError",
    "Generation",
    "GraphError",
    "Handle",
    "IntegrityError",
    "ManifestError",
    "ModelError",
    "QueueFullError",
    "Receipt",
    "Reload",
    "Request",
    "RequestError",
    "RequestTimeoutError",
    "SamplingParams",
    "Span",
    "StructuredOutput",
    "TextPiece",
    "UnknownTaskError",
    "WriteError",
]
