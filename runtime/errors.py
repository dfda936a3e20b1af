"""Errors that the kit raises on purpose.

The tree::

    AdaLinkError
    ├── ConfigError              a setting is outside what the method allows (rank 0, unknown activation)
    ├── ModelError               a base model cannot be used: unknown architecture, pickled weights
    ├── AdapterError             an adapter folder is missing, truncated, altered or holds NaN
    ├── ContractError            a mismatch: adapter and base, task graph and engine
    ├── GraphError               an ONNX graph is not what its role demands
    ├── DeploymentError          a deployment folder cannot be read or written
    │   ├── ManifestError        manifest.json is wrong; ``field`` is the path of the wrong entry
    │   ├── IntegrityError       a file is not, byte for byte, the one in the manifest
    │   ├── BusyError            another process is changing the deployment
    │   └── WriteError           the disk refused: full, read-only, no permission
    ├── RequestError             a call that cannot be answered: token id out of range, wrong dtype, too long
    │   ├── UnknownTaskError     a task of that name is not deployed
    │   ├── QueueFullError       too many requests wait already
    │   └── RequestTimeoutError  the deadline of a request has passed
    ├── DataError                a training or evaluation file is wrong; the message names the line
    └── BackendError             an engine refused
        └── BackendUnavailableError   the engine's package or device is not on this machine

All are user errors: the command line prints their message alone and exits with code 2. A message names the object,
what was received, what was expected and the repair.
"""

from __future__ import annotations

__all__ = [
    "AdaLinkError",
    "AdapterError",
    "BackendError",
    "BackendUnavailableError",
    "BusyError",
    "ConfigError",
    "ContractError",
    "DataError",
    "DeploymentError",
    "GraphError",
    "IntegrityError",
    "ManifestError",
    "ModelError",
    "QueueFullError",
    "RequestError",
    "RequestTimeoutError",
    "UnknownTaskError",
    "WriteError",
]


class AdaLinkError(Exception):
    """Base of every error the kit raises on purpose."""


class ConfigError(AdaLinkError, ValueError):
    """A setting is outside what the method allows."""


class ModelError(AdaLinkError):
    """A base model cannot be used."""


class AdapterError(AdaLinkError):
    """An adapter folder is missing, truncated, altered or numerically broken."""


class ContractError(AdaLinkError):
    """Two things that do not belong together, such as an adapter and the base of another model."""


class GraphError(AdaLinkError):
    """An ONNX graph is not what its role demands."""


class DeploymentError(AdaLinkError):
    """A deployment folder cannot be read or written."""


class ManifestError(DeploymentError):
    """``manifest.json`` is wrong.

    Attributes:
        field: path of the wrong entry, such as ``$.base.hidden_size``; ``$`` for the whole file.
    """

    def __init__(self, message: str, field: str = "$") -> None:
        super().__init__(message)
        self.field = field


class IntegrityError(DeploymentError):
    """A file is not, byte for byte, the one that the manifest records."""


class BusyError(DeploymentError):
    """Another process is changing the deployment."""


class WriteError(DeploymentError):
    """The disk refused a write: full, read-only or without permission."""


class RequestError(AdaLinkError, ValueError):
    """A call that cannot be answered as it stands."""


class UnknownTaskError(RequestError):
    """A task of that name is not deployed."""


class QueueFullError(RequestError):
    """Too many requests wait already; the same request may be answered later."""


class RequestTimeoutError(RequestError):
    """The deadline of a request has passed before its end."""


class DataError(AdaLinkError):
    """A training or evaluation file is wrong; the message names the file and line."""


class BackendError(AdaLinkError):
    """An engine refused to load or run."""


class BackendUnavailableError(BackendError):
    """The engine's package or device is not on this machine."""
