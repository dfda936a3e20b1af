"""What is asked of an engine, checked before anything is built: its name, its tasks, and the graph it is built from."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from adalink.export.engine.graph import check_buildable
from adalink.runtime.errors import ConfigError, DeploymentError
from adalink.runtime.near_names import did_you_mean
from adalink.runtime.storage.known_tasks import check_tasks
from adalink.runtime.storage.manifest import Base, Manifest, Variant

_PORTABLE = "portable"
_DTYPES = {"float16": "fp16", "bfloat16": "bf16"}


def check_request(manifest: Manifest, engine: str, tasks: Sequence[str], *, replace: bool) -> None:
    """Check that an engine of that name can be built for these tasks.

    Raises:
        ConfigError: the base cannot be built.
        DeploymentError: the name is taken.
        UnknownTaskError: a task is not deployed.
    """
    check_buildable(manifest.base)
    existing = manifest.variants.get(engine)
    if existing is not None and not existing.is_compiled:
        raise DeploymentError(f"variant {engine!r} is a graph, not an engine: choose another --name")
    if existing is not None and not replace:
        raise DeploymentError(f"the deployment already has an engine {engine!r}: pass --replace to build it again")
    check_tasks(tasks, manifest.tasks)


def has_portable(manifest: Manifest) -> bool:
    """Whether a deployment has a graph that engines are built from."""
    return any(map(_is_portable, manifest.variants.values()))


def find_portable(folder: Path, manifest: Manifest, name: str | None) -> str:
    """Name of the portable variant to build an engine from.

    Args:
        folder: the deployment, for messages.
        manifest: its manifest.
        name: the requested variant.

    Raises:
        ConfigError: it is none that an engine can be built from.
        DeploymentError: there is no portable variant.
    """
    variants = manifest.variants
    advice = f"name the base model with --model, or run '{_command(folder, manifest.base)}' first"
    if name is None:
        portable = sorted(key for key, variant in variants.items() if _is_portable(variant))
        if not portable:
            raise DeploymentError(
                f"the deployment has no portable base graph to build from, only {', '.join(sorted(variants))}: {advice}"
            )
        return portable[0]
    if name not in variants:
        raise ConfigError(
            f"variant is {name!r}, expected one of {', '.join(sorted(variants))}{did_you_mean(name, variants)}"
        )
    if not _is_portable(variants[name]):
        variant = variants[name]
        what = "an engine already" if variant.is_compiled else f"for {variant.target}"
        what = "quantised with operators of ONNX Runtime" if variant.quantization else what
        raise ConfigError(f"variant {name!r} is {what}: engines are built from a portable graph; {advice}")
    return name


def _is_portable(variant: Variant) -> bool:
    return variant.target == _PORTABLE and variant.quantization is None and not variant.is_compiled


def _command(folder: Path, base: Base) -> str:
    """The command that adds the portable graph of a base; MODEL is for the user to fill in."""
    dtype = ["--dtype", _DTYPES[base.embedding_dtype]] if base.embedding_dtype in _DTYPES else []
    more = base.modalities[1:] if base.vision is None else ()
    modalities = [word for name in more for word in ("--modality", name)]
    words = ("adalink", "export", "base", "MODEL", "--out", str(folder), "--target", _PORTABLE, *dtype, *modalities)
    return shlex.join(words)
